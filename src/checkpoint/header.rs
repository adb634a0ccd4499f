//! The header of one safetensors file: eight bytes of length, JSON, then the tensors' bytes without gaps.
//!
//! The JSON is read by a visitor that bounds memory, refuses duplicate names and names the tensor at fault; the crate
//! `safetensors` has the last word on whether the whole is a valid file.

use std::fmt;
use std::ops::Range;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Dtype;
use super::json::{clip, name as short};
use crate::error::{Error, Result};

/// The longest header that the format allows.
const MAX_HEADER: u64 = 32 << 20;
/// No model needs more; the bound keeps a hostile header from filling memory.
const MAX_DIMS: usize = 8;

/// One tensor as the header describes it.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Byte range within the whole file.
    pub(super) range: Range<usize>,
}

/// Reads and checks the header of `bytes`, a whole file called `file` in messages. Entries come in file order.
pub(super) fn read(file: &str, bytes: &[u8]) -> Result<Vec<Entry>> {
    let fault = |reason: String| Error::file(file, reason);
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(fault("is a Git LFS pointer, not the weights: run `git lfs pull`".into()));
    }
    if bytes.starts_with(b"GGUF") {
        return Err(fault("is a GGUF file: give the Hugging Face directory with *.safetensors".into()));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(fault(format!("is truncated: {} bytes, and the header's length alone takes 8", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(fault(format!("claims a header of {length} bytes; at most {MAX_HEADER} are read")));
    }
    let (Ok(length), true) = (usize::try_from(length), length <= rest.len() as u64) else {
        return Err(fault(format!("claims a header of {length} bytes, but only {} follow: truncated?", rest.len())));
    };
    let (json, data) = rest.split_at(length);
    if json.first() != Some(&b'{') {
        return Err(fault("has a header that is not a JSON object".into()));
    }
    let Raw(mut raw) = serde_json::from_slice(json)
        .map_err(|e| fault(format!("has a broken header: {}", clip(&e.to_string(), 200))))?;
    raw.sort_by_key(|(_, e)| e.offsets);
    check(file, &raw, data.len() as u64)?;

    let base = 8 + length;
    let entry = |(name, e): (String, RawEntry)| {
        // `check` has shown that the offsets lie within `data`.
        let range = base + e.offsets.0 as usize..base + e.offsets.1 as usize;
        Entry { name, dtype: e.dtype, shape: e.shape, range }
    };
    let entries: Vec<Entry> = raw.into_iter().map(entry).collect();
    let infos = entries.iter().map(|e| {
        let data_offsets = (e.range.start - base, e.range.end - base);
        (e.name.clone(), TensorInfo { dtype: e.dtype.on_disk(), shape: e.shape.clone(), data_offsets })
    });
    Metadata::new(None, infos.collect())
        .map_err(|e| fault(format!("is not a valid safetensors file: {}", clip(&e.to_string(), 200))))?;
    Ok(entries)
}

/// Tensors, sorted by offset, must tile `[0, data_len)` exactly, each with the bytes that its dtype and shape need.
fn check(file: &str, sorted: &[(String, RawEntry)], data_len: u64) -> Result<()> {
    let mut end = 0;
    let mut before = "";
    for (name, e) in sorted {
        let fault = |reason: String| Error::tensor(file, short(name), reason);
        let (from, to) = e.offsets;
        if from > to {
            return Err(fault(format!("begins at byte {from}, after its end at {to}")));
        }
        if to > data_len {
            return Err(fault(format!("ends at byte {to} of the data, which has {data_len}: truncated?")));
        }
        if from < end {
            return Err(fault(format!("begins at byte {from}, inside {}, which ends at {end}", short(before))));
        }
        if from > end {
            return Err(fault(format!("begins at byte {from}; bytes {end}..{from} belong to no tensor")));
        }
        let elements = e.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let bits = elements.and_then(|n| n.checked_mul(e.dtype.bits() as u64));
        if bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8) != Some(to - from) {
            let (dtype, shape) = (e.dtype, &e.shape);
            let needs = match bits {
                None => "more bytes than 64 bits can count".into(),
                Some(bits) if bits % 8 != 0 => "no whole number of bytes".into(),
                Some(bits) => format!("{} bytes", bits / 8),
            };
            return Err(fault(format!("has {} bytes, but {dtype} {shape:?} needs {needs}", to - from)));
        }
        (end, before) = (to, name);
    }
    if end != data_len {
        let reason = format!("has {data_len} bytes of data, but its tensors end at byte {end}");
        return Err(Error::file(file, reason));
    }
    Ok(())
}

struct RawEntry {
    dtype: Dtype,
    shape: Vec<usize>,
    offsets: (u64, u64),
}

/// The header's JSON: names and entries, `__metadata__` checked and dropped.
struct Raw(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut names = std::collections::HashSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format_args!("{} stands there twice", short(&name))));
            }
            if name == "__metadata__" {
                map.next_value::<Notes>()?;
                continue;
            }
            let entry = map.next_value::<RawEntry>();
            let entry = entry.map_err(|e| A::Error::custom(format_args!("tensor {}: {e}", short(&name))))?;
            entries.push((name, entry));
        }
        Ok(Raw(entries))
    }
}

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Fields {
            dtype: Word,
            shape: Shape,
            data_offsets: (u64, u64),
        }
        let Fields { dtype: Word(dtype), shape: Shape(shape), data_offsets } = Fields::deserialize(deserializer)?;
        Ok(Self { dtype, shape, offsets: data_offsets })
    }
}

struct Word(Dtype);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        let unknown = || D::Error::custom(format_args!("unknown dtype {}", short(&word)));
        Dtype::from_word(&word).map(Self).ok_or_else(unknown)
    }
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a shape: a list of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element::<usize>()? {
                    if dims.len() == MAX_DIMS {
                        return Err(A::Error::custom(format_args!("shape of more than {MAX_DIMS} dimensions")));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

/// `__metadata__` must map strings to strings; its contents mean nothing to us and are not kept.
struct Notes;

impl<'de> Deserialize<'de> for Notes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Notes;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("__metadata__ as an object of strings")
            }

            fn visit_unit<E>(self) -> Result<Notes, E> {
                Ok(Notes)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Notes, A::Error> {
                while map.next_entry::<IgnoredAny, String>()?.is_some() {}
                Ok(Notes)
            }
        }
        deserializer.deserialize_any(Strings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    #[test]
    fn accepts_what_the_format_allows() {
        let json = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"U8","shape":[2,3],"data_offsets":[4,10]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
            "z":{"dtype":"BF16","shape":[0,5],"data_offsets":[4,4]},
            "f":{"dtype":"F4","shape":[4],"data_offsets":[10,12]}}   "#;
        let bytes = file(json, 12);
        let entries = read("f", &bytes).unwrap();
        let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["a", "z", "b", "f"]);
        assert_eq!(bytes[entries[2].range.clone()], [7; 6]);
        assert!(read("f", &file("{}", 0)).unwrap().is_empty());
    }

    #[test]
    fn names_the_tensor_and_the_reason() {
        let one = |entry: &str| format!(r#"{{"t":{{{entry}}}}}"#);
        for (json, data, words) in [
            (one(r#""dtype":"U8","shape":[4],"data_offsets":[0,4]"#), 3, "truncated"),
            (one(r#""dtype":"U8","shape":[4],"data_offsets":[0,4]"#), 5, "tensors end at byte 4"),
            (one(r#""dtype":"U8","shape":[4],"data_offsets":[1,5]"#), 5, "belong to no tensor"),
            (one(r#""dtype":"U8","shape":[4],"data_offsets":[4,0]"#), 4, "after its end"),
            (one(r#""dtype":"F32","shape":[4],"data_offsets":[0,4]"#), 4, "F32 [4] needs 16 bytes"),
            (one(r#""dtype":"F4","shape":[3],"data_offsets":[0,1]"#), 1, "no whole number of bytes"),
            (one(r#""dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]"#), 0, "more bytes than"),
            (one(r#""dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]"#), 1, "more than 8 dimensions"),
            (one(r#""dtype":"Q4","shape":[1],"data_offsets":[0,1]"#), 1, "unknown dtype Q4"),
            (one(r#""dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]"#), 1, "duplicate field"),
            (one(r#""dtype":"U8","shape":[-1],"data_offsets":[0,1]"#), 1, "tensor t"),
            (r#"{"__metadata__":{"a":1}}"#.into(), 0, "expected a string"),
            (r#" {}"#.into(), 0, "not a JSON object"),
        ] {
            let error = read("f", &file(&json, data)).err().expect(&json).to_string();
            assert!(error.contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn is_at_least_as_strict_as_the_safetensors_crate() {
        let dtypes = ["U8", "F32", "F4", "BF16", "X"];
        let mut accepted = 0;
        for seed in 0..20_000u32 {
            let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
            let mut next = |n: u32| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 16) % n
            };
            let (a, b, d) = (next(5), next(3), dtypes[next(5) as usize]);
            let (s, t) = (next(3), next(9));
            let json = format!(
                r#"{{"x":{{"dtype":"{d}","shape":[{a},{b}],"data_offsets":[0,{t}]}},
                    "y":{{"dtype":"U8","shape":[{s}],"data_offsets":[{t},{}]}}}}"#,
                t + next(3)
            );
            let bytes = file(&json, next(12) as usize);
            if read("f", &bytes).is_ok() {
                accepted += 1;
                safetensors::SafeTensors::deserialize(&bytes).expect(&json);
            }
        }
        assert!(accepted > 20, "only {accepted} accepted: the test shows nothing");
    }
}
