"""Write the NVFP4 number-format fixtures.   python gen_fixtures.py --seed 1 --out fixtures"""
import argparse, json, math, os, struct
import torch
from safetensors.torch import save_file
import nvfp4_ref as R

ap = argparse.ArgumentParser()
ap.add_argument("--seed", type=int, default=1)
ap.add_argument("--out", default="fixtures")
args = ap.parse_args()
os.makedirs(args.out, exist_ok=True)
gen = torch.Generator().manual_seed(args.seed)


def rnd(*s):
    return torch.randn(*s, generator=gen)


def dump(name, obj):
    with open(os.path.join(args.out, name), "w") as f:
        json.dump(obj, f, separators=(",", ":"))


def bits(v):
    return struct.unpack("<I", struct.pack("<f", v))[0]


# 1. every code of the three formats, as f32 bit patterns (NaN as 0x7fc00000)
def table(t):
    return [0x7FC00000 if math.isnan(v) else bits(v) for v in t.tolist()]


e8 = R.e8m0_table()
dump("codes.json", {
    "note": "value of code i as the bits of an IEEE f32; NaN is 2143289344",
    "e2m1": table(R.e2m1_table()), "e4m3fn": table(R.e4m3_table()),
    "e8m0fnu": table(e8.float()),
})

# 2. rounding vectors: each midpoint, its neighbours, table values, extremes, random
def vectors(fmt):
    pos, mid = R._POS[fmt], R._MID[fmt]
    xs = [0.0, 1e-30, 1e-9, float(pos[1]) * 0.4999999, 1e30, 3.0e38]
    for m in mid.tolist():
        m32 = torch.tensor(m, dtype=torch.float32)
        xs += [float(m32), float(torch.nextafter(m32, torch.tensor(0.0))),
               float(torch.nextafter(m32, torch.tensor(1e9)))]
    xs += pos.float().tolist()
    top = float(pos[-1])
    xs += [top * f for f in (0.999, 1.001, 1.03, 1.0357143, 1.04, 1.5, 16)]
    x = torch.tensor(xs, dtype=torch.float32)
    x = torch.cat([x, rnd(200) * top / 4, torch.exp2(rnd(200) * 3)])
    return torch.cat([x, -x])


qv = {}
for fmt, enc in (("e2m1", R.encode_e2m1), ("e4m3", R.encode_e4m3)):
    x = vectors(fmt)
    qv[f"{fmt}.x"], qv[f"{fmt}.code"] = x, enc(x)

# 3. activation blocks against a fixed global scale: normal, all-zero, saturating, underflowing, ties
gs = 2.8628389e-04                      # 0.76953125/2688, the size of a real layer-0 scale
x = rnd(24, 64) * 0.2
x[1] = 0
x[2, 16:32] = 0
x[3] *= 40                              # every block scale saturates at 448
x[4, :16] *= 1e-4                       # block scale near the E4M3 subnormals
x[5, :16] *= 1e-7                       # block scale rounds to zero: whole block becomes 0
x[6, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2) * torch.tensor([1.0, -1.0] * 8) * gs
x[7, 5] = -0.0
x[8, 0] = 0.76953125                    # exactly the calibrated amax: scale 448, code 6
for tag, g in (("static", torch.tensor(gs)), ("dyn_tensor", R.dynamic_scale(x, False)),
               ("dyn_token", R.dynamic_scale(x, True))):
    c, s = R.quant_activation(x, g)
    qv[f"act.{tag}.gs"] = g.reshape(-1).contiguous()
    qv[f"act.{tag}.codes"], qv[f"act.{tag}.packed"], qv[f"act.{tag}.scale"] = c, R.pack(c), s
    qv[f"act.{tag}.dequant"] = R.fake_quant(x, g)
    # elements whose rounding would change under a 2e-6 relative change of the operand
    lo, hi = R.quant_activation(x, g * (1 + 2e-6)), R.quant_activation(x, g * (1 - 2e-6))
    qv[f"act.{tag}.ambiguous_scale"] = ((lo[1] != s) | (hi[1] != s)).to(torch.uint8)
    qv[f"act.{tag}.ambiguous_code"] = ((lo[0] != c) | (hi[0] != c)).to(torch.uint8)
qv["act.x"] = x

# 4. the two writers on one bf16 weight (with a zero block), and the decode of both
w = (rnd(20, 96) * 0.05).bfloat16()
w[3, 32:48] = 0
p, s, g = R.quant_weight_modelopt(w)
qv |= {"weight.bf16": w, "weight.modelopt.packed": p, "weight.modelopt.scale": R.as_e4m3(s),
       "weight.modelopt.scale_2": g.reshape(()), "weight.modelopt.dequant": R.dequant(p, s, g)}
p, s, G = R.quant_weight_ct(w)
qv |= {"weight.ct.packed": p, "weight.ct.scale": R.as_e4m3(s), "weight.ct.global_scale": G.reshape(1),
       "weight.ct.dequant": R.dequant(p, s, 1.0 / G)}

# 5. MXFP4 and 128x128 block FP8 (DeepSeek-V4's original checkpoint)
w = rnd(40, 96) * 0.03
p, e = R.quant_mxfp4(w)
qv |= {"mxfp4.packed": p.view(torch.int8), "mxfp4.scale": e.view(torch.float8_e8m0fnu),
       "mxfp4.dequant": R.dequant_mxfp4(p, e)}
w = rnd(200, 300) * 0.03
w[130:] *= 37
q, e = R.quant_fp8_block(w)
qv |= {"fp8block.weight": R.as_e4m3(q), "fp8block.scale": e.view(torch.float8_e8m0fnu),
       "fp8block.dequant": R.dequant_fp8_block(q, e)}
save_file({k: v.contiguous() for k, v in qv.items()}, os.path.join(args.out, "quant_vectors.safetensors"))

# 6. swizzle index maps
maps = []
for mn, ksf in ((1, 1), (32, 4), (33, 5), (128, 4), (130, 6), (200, 13), (257, 8)):
    fwd = [[R.swizzle_offset(r, k, ksf) for k in range(ksf)] for r in range(mn)]
    maps.append({"mn": mn, "k_sf": ksf, "bytes": R.swizzled_size(mn, ksf), "offset": fwd if mn <= 40 else None,
                 "samples": [[r, k, R.swizzle_offset(r, k, ksf)] for r in range(0, mn, 7) for k in range(ksf)],
                 "inverse_samples": [[o, *R.unswizzle_coord(o, ksf)] for o in range(0, R.swizzled_size(mn, ksf), 37)]})
dump("swizzle.json", {"note": "row-major scale (mn,k_sf) -> byte offset; padding bytes are 0", "maps": maps})

# 7. GEMM fixtures: D[m,n] = alpha * sum_k A[m,k]*SFA * B[n,k]*SFB ; f64 result
G, meta = {}, []


def gemm(name, ac, asf, bc, bsf, ga, gb, note):
    a = R.decode_e2m1(ac).double().unflatten(-1, (-1, 16)) * R.decode_e4m3(asf).double().unsqueeze(-1)
    b = R.decode_e2m1(bc).double().unflatten(-1, (-1, 16)) * R.decode_e4m3(bsf).double().unsqueeze(-1)
    alpha = float(torch.tensor(ga, dtype=torch.float32) * torch.tensor(gb, dtype=torch.float32))
    d = a.flatten(1) @ b.flatten(1).T * alpha
    G.update({f"{name}.a": R.pack(ac), f"{name}.a_scale": asf, f"{name}.a_scale_swizzled": R.swizzle(asf),
              f"{name}.b": R.pack(bc), f"{name}.b_scale": bsf, f"{name}.b_scale_swizzled": R.swizzle(bsf),
              f"{name}.d_f64": d})
    meta.append({"name": name, "m": ac.shape[0], "n": bc.shape[0], "k": ac.shape[1], "a_global": ga,
                 "b_global": gb, "alpha": alpha, "note": note})


def codes(v, m, k):
    return torch.full((m, k), v, dtype=torch.uint8)


one = R.encode_e4m3(torch.tensor(1.0)).item()
gemm("uniform", codes(3, 4, 32), codes(one, 4, 2), codes(3, 8, 32), codes(one, 8, 2), 1.0, 1.0,
     "1.5*1.5*32 = 72 everywhere")
bc = torch.arange(16, dtype=torch.uint8).unsqueeze(1).expand(16, 64).contiguous()
gemm("columns", codes(2, 3, 64), codes(one, 3, 4), bc, codes(one, 16, 4), 1.0, 1.0,
     "weight row n holds code n; D[m,n] = 64*value(n)")
ac = codes(2, 5, 64)
asf = R.encode_e4m3(torch.tensor([[2.0 ** ((m + k) % 5 - 2) for k in range(4)] for m in range(5)]))
bsf = R.encode_e4m3(torch.tensor([[2.0 ** ((n * 3 + k) % 4) for k in range(4)] for n in range(6)]))
gemm("scales", ac, asf, codes(1, 6, 64), bsf, 0.5, 0.25, "constant codes; only the scales vary")
bc = torch.zeros(4, 32, dtype=torch.uint8)
bc[0, 0] = 2; bc[1, 1] = 2; bc[2, 16] = 2; bc[3, 31] = 2
ac = R.encode_e2m1(torch.tensor([[0.5, 1, 1.5, 2, 3, 4, 6, -0.5] * 4]))
gemm("one_hot", ac, codes(one, 1, 2), bc, codes(one, 4, 2), 1.0, 1.0, "picks elements 0,1,16,31: nibble order and block edges")
for name, m, n, k in (("random_small", 7, 40, 96), ("random_ragged", 130, 136, 208)):
    xa, wb = rnd(m, k), rnd(n, k) * 0.05
    ga = float(R.dynamic_scale(xa, False))
    ac, asf = R.quant_activation(xa, ga)
    p, bsf, gb = R.quant_weight_modelopt(wb)
    gemm(name, ac, asf, R.unpack(p), bsf, ga, float(gb), "random; alpha = a_global*b_global")
save_file({k: v.contiguous() for k, v in G.items()}, os.path.join(args.out, "gemm.safetensors"))
dump("gemm.json", {"note": "a [M,K/2] and b [N,K/2] packed, low nibble first; *_scale E4M3 codes as U8 row-major; "
                   "D = alpha * sum(a*sfa*b*sfb)", "cases": meta})

# 8. one MoE block: gate and up with DIFFERENT global scales, static and dynamic activation scales
E, T, K, I, top = 4, 9, 64, 48, 2
M = {"x": rnd(T, K), "topk_index": torch.stack([torch.randperm(E, generator=gen)[:top] for _ in range(T)]).int(),
     "topk_weight": torch.softmax(rnd(T, top), -1)}
deq = {}
for e in range(E):
    for proj, shp in (("gate", (I, K)), ("up", (I, K)), ("down", (K, I))):
        w = rnd(*shp) * (0.12 if proj != "up" else 0.31)
        p, s, g = R.quant_weight_modelopt(w)
        M |= {f"{e}.{proj}.weight": p, f"{e}.{proj}.weight_scale": R.as_e4m3(s), f"{e}.{proj}.weight_scale_2": g.reshape(())}
        deq[e, proj] = R.dequant(p, s, g).double()
in1 = float(M["x"].abs().max() / R.TWO_LEVEL_MAX)
in2 = 0.002
M |= {"input_scale_13": torch.tensor(in1), "input_scale_2": torch.tensor(in2)}


def block(q1, q2, weight_before_down=False):
    y = torch.zeros(T, K, dtype=torch.float64)
    x = q1(M["x"])
    acts = torch.zeros(T, top, I)
    for t in range(T):
        for j in range(top):
            e = int(M["topk_index"][t, j])
            g_, u_ = deq[e, "gate"] @ x[t].double(), deq[e, "up"] @ x[t].double()
            acts[t, j] = (g_ * torch.sigmoid(g_) * u_).float()
    if weight_before_down:
        acts = acts * M["topk_weight"].unsqueeze(-1)
    acts = q2(acts)
    for t in range(T):
        for j in range(top):
            r = deq[int(M["topk_index"][t, j]), "down"] @ acts[t, j].double()
            y[t] += r if weight_before_down else float(M["topk_weight"][t, j]) * r
    return y


ident = lambda v: v
M["y.w4a16"] = block(ident, ident)
M["y.w4a4_static"] = block(lambda v: R.fake_quant(v, in1), lambda v: R.fake_quant(v, in2))
M["y.w4a4_static_weight_before_down"] = block(lambda v: R.fake_quant(v, in1), lambda v: R.fake_quant(v, in2), True)
M["y.w4a4_dyn_tensor"] = block(lambda v: R.fake_quant(v, R.dynamic_scale(v, False)), lambda v: R.fake_quant(v, R.dynamic_scale(v, False)))
M["y.w4a4_dyn_token"] = block(lambda v: R.fake_quant(v, R.dynamic_scale(v, True)), lambda v: R.fake_quant(v, R.dynamic_scale(v, True)))
save_file({k: v.contiguous() for k, v in M.items()}, os.path.join(args.out, "moe_block.safetensors"))
print({f: os.path.getsize(os.path.join(args.out, f)) for f in sorted(os.listdir(args.out))})
