//! The number formats against vectors from other people's code (`fixtures/format/README.md` says whose): every code,
//! every rounding case, whole tensors bit for bit.

use std::{fs, path::PathBuf};

use fourfold::format::{
    Format, bf16, e2m1, e4m3, e8m0, mxfp4,
    nvfp4::{self, Encoded, Global},
};
use safetensors::SafeTensors;
use serde_json::Value;

// ---- reading fixtures

fn read(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format").join(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&read(name)).unwrap()
}

fn uint(v: &Value) -> usize {
    v.as_u64().unwrap_or_else(|| panic!("{v} is not a number")) as usize
}

fn list(v: &Value) -> &[Value] {
    v.as_array().unwrap_or_else(|| panic!("{v} is not a list"))
}

/// A safetensors file and typed views of its tensors.
struct Tensors<'a>(SafeTensors<'a>);

impl<'a> Tensors<'a> {
    fn new(file: &'a [u8]) -> Self {
        Self(SafeTensors::deserialize(file).unwrap())
    }

    fn bytes(&self, name: &str) -> &[u8] {
        self.0.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data()
    }

    fn shape(&self, name: &str) -> [usize; 2] {
        self.0.tensor(name).unwrap().shape().try_into().unwrap()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        self.bytes(name).as_chunks().0.iter().map(|c| f64::from_le_bytes(*c)).collect()
    }

    fn bf16(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|c| half::bf16::from_le_bytes(*c).to_f32()).collect()
    }
}

// ---- comparing

/// Where two rows of numbers differ in any bit; all NaNs count as one.
fn differences(got: &[f32], want: &[f32]) -> Vec<usize> {
    assert_eq!(got.len(), want.len());
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    (0..got.len()).filter(|&i| !same(got[i], want[i])).collect()
}

fn assert_same(what: &str, got: &[f32], want: &[f32]) {
    let at = differences(got, want);
    assert!(at.is_empty(), "{what}: element {} is {}, not {} ({} differ)", at[0], got[at[0]], want[at[0]], at.len());
}

fn from_bits(codes: &Value) -> Vec<f32> {
    list(codes).iter().map(|b| f32::from_bits(uint(b) as u32)).collect()
}

/// A whole matrix `[n, k]`, row by row through `Format`.
fn decode(format: Format, codes: &[u8], scales: &[u8], tensor_scale: f32, k: usize) -> Vec<f32> {
    let (row, scale_row) = (format.row_bytes(k), format.scale_bytes(k));
    assert_eq!(codes.len() / row, scales.len() / scale_row, "as many rows of codes as of scales");
    let mut out = vec![f32::NAN; codes.len() / row * k];
    for ((out, codes), scales) in out.chunks_mut(k).zip(codes.chunks(row)).zip(scales.chunks(scale_row)) {
        format.decode_row(codes, scales, tensor_scale, out);
    }
    out
}

// ---- single numbers

#[test]
fn every_code_of_the_small_formats_decodes() {
    let codes = json("codes.json");
    let all = |decode: fn(u8) -> f32, n: usize| (0..n).map(|c| decode(c as u8)).collect::<Vec<_>>();
    assert_same("e2m1", &all(e2m1::decode, 16), &from_bits(&codes["e2m1"]));
    assert_same("e4m3", &all(e4m3::decode, 256), &from_bits(&codes["e4m3fn"]));
    assert_same("e8m0", &all(e8m0::decode, 256), &from_bits(&codes["e8m0fnu"]));
}

#[test]
fn every_code_survives_decoding_and_encoding() {
    for code in 0..=255u8 {
        assert_eq!(e2m1::encode(e2m1::decode(code)), code & 15);
        assert_eq!(e4m3::encode(e4m3::decode(code)) & 0x7f, code & 0x7f);
        assert!(code & 0x7f == 0x7f || e4m3::encode(e4m3::decode(code)) == code, "sign of {code:#x}");
        assert_eq!(e8m0::encode(e8m0::decode(code)), (code != 255).then_some(code));
    }
}

#[test]
fn rounding_agrees_on_every_vector() {
    let file = read("quant_vectors.safetensors");
    let t = Tensors::new(&file);
    for (name, encode) in [("e2m1", e2m1::encode as fn(f32) -> u8), ("e4m3", e4m3::encode)] {
        let (x, want) = (t.f32(&format!("{name}.x")), t.bytes(&format!("{name}.code")));
        assert_eq!(x.len(), want.len());
        for (x, want) in x.iter().zip(want) {
            assert_eq!(encode(*x), *want, "{name} of {x} ({:#010x})", x.to_bits());
        }
    }
}

#[test]
fn bf16_agrees_with_half_on_every_pattern_and_at_every_midpoint() {
    for bits in 0..=u16::MAX {
        let theirs = half::bf16::from_bits(bits);
        assert_same("decode", &[bf16::decode(bits)], &[theirs.to_f32()]);
        // The number itself, its midpoint to the next one, and both neighbours of each.
        for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(bits) << 16 | low);
            let (ours, theirs) = (bf16::encode(x), half::bf16::from_f32(x));
            if x.is_nan() {
                assert!(bf16::decode(ours).is_nan() && theirs.is_nan(), "NaN {:#010x}", x.to_bits());
            } else {
                assert_eq!(ours, theirs.to_bits(), "encode {:#010x}", x.to_bits());
            }
        }
    }
}

// ---- MXFP4

fn hex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn mxfp4_blocks_decode_to_the_bit() {
    let vectors = json("mxfp4_vectors.json");
    assert_eq!(list(&vectors["rows"]).len(), 10);
    for row in list(&vectors["rows"]) {
        let bits = list(&row["float32_bits"]).iter().map(|b| u32::from_str_radix(b.as_str().unwrap(), 16).unwrap());
        let want: Vec<f32> = bits.map(f32::from_bits).collect();
        let got = decode(Format::Mxfp4, &hex(&row["block"]), &[uint(&row["scale"]) as u8], 1.0, 32);
        assert_same(row["what"].as_str().unwrap(), &got, &want);
    }
}

#[test]
fn mxfp4_weights_decode_and_encode_back() {
    let file = read("quant_vectors.safetensors");
    let t = Tensors::new(&file);
    let (codes, scales, want) = (t.bytes("mxfp4.packed"), t.bytes("mxfp4.scale"), t.f32("mxfp4.dequant"));
    let [_, k] = t.shape("mxfp4.dequant");
    assert_same("mxfp4", &decode(Format::Mxfp4, codes, scales, 1.0, k), &want);

    // The writer took the ceiling rule, ours is the floor rule: other bytes for some blocks, but every number that a
    // block can hold under the one is held exactly under the other.
    let (codes, scales) = mxfp4::encode_row(&want).unwrap();
    assert_same("mxfp4 again", &decode(Format::Mxfp4, &codes, &scales, 1.0, k), &want);
}

#[test]
fn mxfp4_encoding_keeps_the_bytes_of_blocks_that_use_their_range() {
    // Every scale, codes that include 6: the floor rule must find the same scale and nibbles again.
    let block: [u8; mxfp4::BLOCK_BYTES] = std::array::from_fn(|i| (i as u8).wrapping_mul(0x35) ^ 0x71);
    assert!(e2m1::unpack(&block).iter().any(|c| c & 7 == 7));
    for scale in 0..=252 {
        let mut x = [f32::NAN; mxfp4::BLOCK];
        mxfp4::decode(&block, scale, &mut x);
        assert_eq!(mxfp4::encode(&x).unwrap(), (block, scale));
    }
}

// ---- NVFP4

#[test]
fn nvfp4_activations_are_quantised_as_the_reference_does() {
    let file = read("quant_vectors.safetensors");
    let t = Tensors::new(&file);
    let x = t.f32("act.x");
    let [n, k] = t.shape("act.x");
    let row = |v: &[f32], i: usize| v[i * k..][..k].to_vec();

    for tag in ["static", "dyn_tensor", "dyn_token"] {
        let name = |part: &str| format!("act.{tag}.{part}");
        let globals = t.f32(&name("gs"));
        let (codes, packed, scales) = (t.bytes(&name("codes")), t.bytes(&name("packed")), t.bytes(&name("scale")));
        let (skip_code, skip_scale) = (t.bytes(&name("ambiguous_code")), t.bytes(&name("ambiguous_scale")));
        let dequant = t.f32(&name("dequant"));
        assert_eq!(e2m1::pack(codes), packed, "{tag}: packing");

        for i in 0..n {
            let global = Global::Multiplier(globals[if globals.len() == n { i } else { 0 }]);
            match tag {
                "dyn_tensor" => assert_eq!(nvfp4::dynamic_global(&x).unwrap(), global),
                "dyn_token" => assert_eq!(nvfp4::dynamic_global(&row(&x, i)).unwrap(), global, "row {i}"),
                _ => {}
            }
            let got = nvfp4::quantize_activations(&row(&x, i), global).unwrap();
            let got_codes = e2m1::unpack(&got.codes);
            for b in 0..k / nvfp4::BLOCK {
                let block = i * k / nvfp4::BLOCK + b;
                if skip_scale[block] == 0 {
                    assert_eq!(got.scales[b], scales[block], "{tag}: scale of row {i}, block {b}");
                }
            }
            for j in 0..k {
                if skip_code[i * k + j] == 0 {
                    assert_eq!(got_codes[j], codes[i * k + j], "{tag}: code of row {i}, element {j}");
                }
            }
            // Decoding has no ties: the reference's own bytes give its numbers to the bit.
            let (codes, scales) = (&packed[i * k / 2..][..k / 2], &scales[i * k / 16..][..k / 16]);
            let got = decode(Format::Nvfp4, codes, scales, global.multiplier(), k);
            assert_same(&format!("{tag}: row {i}"), &got, &row(&dequant, i));
        }
    }
}

#[test]
fn nvfp4_weights_are_read_and_written_as_both_producers_do() {
    let file = read("quant_vectors.safetensors");
    let t = Tensors::new(&file);
    let w = t.bf16("weight.bf16");
    let [_, k] = t.shape("weight.bf16");
    let read_back = |writer: &str, global: Global| {
        let part = |part: &str| format!("weight.{writer}.{part}");
        let (codes, scales) = (t.bytes(&part("packed")), t.bytes(&part("scale")));
        let got = decode(Format::Nvfp4, codes, scales, global.multiplier(), k);
        assert_same(writer, &got, &t.f32(&part("dequant")));
        Encoded { codes: codes.to_vec(), scales: scales.to_vec(), global }
    };
    let modelopt = read_back("modelopt", Global::Multiplier(t.f32("weight.modelopt.scale_2")[0]));
    assert_eq!(nvfp4::encode_modelopt(&w).unwrap(), modelopt);
    let compressed = read_back("ct", Global::Divisor(t.f32("weight.ct.global_scale")[0]));
    assert_eq!(nvfp4::encode_compressed_tensors(&w).unwrap(), compressed);
    assert_ne!(modelopt.scales, compressed.scales, "the zero block is written differently");
}

#[test]
fn one_corrupted_byte_is_noticed() {
    let file = read("quant_vectors.safetensors");
    let t = Tensors::new(&file);
    let [_, k] = t.shape("weight.modelopt.dequant");
    let (codes, scales) = (t.bytes("weight.modelopt.packed"), t.bytes("weight.modelopt.scale"));
    let (global, want) = (t.f32("weight.modelopt.scale_2")[0], t.f32("weight.modelopt.dequant"));
    let damaged = |bytes: &[u8], at: usize, mask: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= mask;
        bytes
    };
    let got = decode(Format::Nvfp4, &damaged(codes, 70, 0x10), scales, global, k);
    assert_eq!(differences(&got, &want), [141]);
    let got = decode(Format::Nvfp4, codes, &damaged(scales, 9, 0x01), global, k);
    let changed = differences(&got, &want);
    assert!(!changed.is_empty() && changed.iter().all(|i| i / 16 == 9), "{changed:?}");
    let got = decode(Format::Nvfp4, codes, scales, f32::from_bits(global.to_bits() + 1), k);
    assert!(differences(&got, &want).len() > want.len() / 2);
}

#[test]
fn nvfp4_products_come_out_as_in_f64() {
    let file = read("gemm.safetensors");
    let t = Tensors::new(&file);
    let cases = json("gemm.json");
    assert_eq!(list(&cases["cases"]).len(), 6);
    for case in list(&cases["cases"]) {
        let name = case["name"].as_str().unwrap();
        let [m, n, k] = ["m", "n", "k"].map(|d| uint(&case[d]));
        let part = |part: &str| format!("{name}.{part}");
        let product = |a_global: f32, b_global: f32| -> Vec<f64> {
            let a = decode(Format::Nvfp4, t.bytes(&part("a")), t.bytes(&part("a_scale")), a_global, k);
            let b = decode(Format::Nvfp4, t.bytes(&part("b")), t.bytes(&part("b_scale")), b_global, k);
            let dot = |i: usize| {
                let (a, b) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
            };
            (0..m * n).map(dot).collect()
        };
        let want = t.f64(&part("d_f64"));
        assert_eq!(want.len(), m * n);

        // Codes and block scales are exact in f32 and their products in f64: only the order of the sum is free.
        let alpha = case["alpha"].as_f64().unwrap();
        let exact = product(1.0, 1.0);
        for (i, (got, want)) in exact.iter().zip(&want).enumerate() {
            let got = got * alpha;
            assert!((got - want).abs() <= 1e-12 * want.abs().max(alpha * 36.0), "{name}: [{}, {}] {got}", i / n, i % n);
        }
        if !name.starts_with("random") {
            assert!(exact.iter().zip(&want).all(|(got, want)| got * alpha == *want), "{name} is exact");
        }

        // With the tensor scales folded in, every element is rounded to f32 twice on each side, by 2^-24 relative.
        let global = |side: &str| case[side].as_f64().unwrap() as f32;
        let folded = product(global("a_global"), global("b_global"));
        for (got, want) in folded.chunks(n).zip(want.chunks(n)) {
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
            assert!(error <= 2e-6 * norm(&mut want.iter().copied()), "{name}: {error}");
        }

        for (side, rows) in [("a", m), ("b", n)] {
            let (plain, swizzled) =
                (t.bytes(&part(&format!("{side}_scale"))), t.bytes(&part(&format!("{side}_scale_swizzled"))));
            assert_eq!(nvfp4::swizzle(plain, rows, k / 16), swizzled, "{name}.{side}");
            assert_eq!(nvfp4::unswizzle(swizzled, rows, k / 16), plain, "{name}.{side}");
        }
    }
}

#[test]
fn the_products_have_the_values_one_can_work_out_by_hand() {
    let file = read("gemm.safetensors");
    let t = Tensors::new(&file);
    assert!(t.f64("uniform.d_f64").iter().all(|d| *d == 72.0));
    let columns: Vec<f64> = (0..16).map(|code| 64.0 * f64::from(e2m1::decode(code))).collect();
    for row in t.f64("columns.d_f64").chunks(16) {
        assert_eq!(row, columns);
    }
    assert_eq!(t.f64("one_hot.d_f64"), [0.5, 1.0, 0.5, -0.5]);
}

// ---- 128x4 order

#[test]
fn swizzled_offsets_agree_forward_and_back() {
    let maps = json("swizzle.json");
    assert_eq!(list(&maps["maps"]).len(), 7);
    for map in list(&maps["maps"]) {
        let (n_rows, n_scales) = (uint(&map["mn"]), uint(&map["k_sf"]));
        assert_eq!(nvfp4::swizzled_bytes(n_rows, n_scales), uint(&map["bytes"]));
        for (row, offsets) in map["offset"].as_array().into_iter().flatten().enumerate() {
            for (i, offset) in list(offsets).iter().enumerate() {
                assert_eq!(nvfp4::swizzled_offset(row, i, n_scales), uint(offset));
            }
        }
        for sample in list(&map["samples"]) {
            let [row, i, offset] = [0, 1, 2].map(|j| uint(&sample[j]));
            assert_eq!(nvfp4::swizzled_offset(row, i, n_scales), offset);
        }
        for sample in list(&map["inverse_samples"]) {
            let [offset, row, i] = [0, 1, 2].map(|j| uint(&sample[j]));
            assert_eq!(nvfp4::unswizzled_place(offset, n_scales), (row, i));
        }
    }
}

#[test]
fn swizzling_moves_every_scale_to_its_own_place() {
    for (n_rows, n_scales) in [(1, 1), (33, 5), (128, 4), (130, 6), (257, 13)] {
        let bytes = nvfp4::swizzled_bytes(n_rows, n_scales);
        let mut hits = vec![0; bytes];
        for row in 0..n_rows {
            for i in 0..n_scales {
                let offset = nvfp4::swizzled_offset(row, i, n_scales);
                hits[offset] += 1;
                assert_eq!(nvfp4::unswizzled_place(offset, n_scales), (row, i));
            }
        }
        assert!(hits.iter().all(|h| *h <= 1), "two scales in one place");

        // A byte cannot number all scales, so they go twice: with the low and with the high half of their number.
        for half in [0, 8] {
            let scales: Vec<u8> = (1..=n_rows * n_scales).map(|i| (i >> half) as u8).collect();
            let swizzled = nvfp4::swizzle(&scales, n_rows, n_scales);
            assert_eq!(nvfp4::unswizzle(&swizzled, n_rows, n_scales), scales);
            assert!(swizzled.iter().zip(&hits).all(|(s, h)| *h == 1 || *s == 0), "padding is zero");
        }
    }
}
