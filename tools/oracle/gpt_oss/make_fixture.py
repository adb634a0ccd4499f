#!/usr/bin/env python3
"""Build a tiny random gpt-oss checkpoint in the Hugging Face MXFP4 layout and golden outputs for it.

The checkpoint is written the way openai/gpt-oss-20b is written (same tensor names, same dtypes, same
config.json keys, zero-based shard names), then loaded back from disk by Hugging Face transformers, whose
GptOssForCausalLM in float32 on the CPU produces every golden number. Nothing here is a re-implementation
of the model: only the MXFP4 encoder/decoder is ours, and it is checked against transformers' decoder.

    python make_fixture.py --config tiny --seed 4 --out fixtures/tiny
"""
import argparse
import json
import math
import os
import platform
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from safetensors.torch import save_file

MXFP4_BLOCK = 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)  # magnitude of codes 0..7; bit 3 is the sign
PROMPT_LENGTHS = (1, 7, 33, 70)
GREEDY_TOKENS = 32

# Keys with the same value in both released models; per-variant values override them.
RELEASE_KEYS = dict(
    architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0, hidden_act="silu",
    initializer_range=0.02, model_type="gpt_oss", output_router_logits=False, rms_norm_eps=1e-5,
    rope_theta=150000, router_aux_loss_coef=0.9, swiglu_limit=7.0, tie_word_embeddings=False,
    transformers_version="4.55.0.dev0", use_cache=True,
    quantization_config=dict(
        modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                "model.embed_tokens", "lm_head"],
        quant_method="mxfp4"),
)
SLIDING, FULL = "sliding_attention", "full_attention"

TINY = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_local_experts=8,
            num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
            vocab_size=512, sliding_window=16, layer_types=[SLIDING, FULL] * 2,
            rope=dict(factor=32.0, original=4096, theta=150000))
VARIANTS = {
    # The released recipe at toy width: RoPE/YaRN, limit, eps and layer alternation as released.
    "tiny": TINY,
    "tiny_top2": TINY | dict(num_experts_per_tok=2),
    # One residual channel climbs past 65504, float16's largest value, as the released 120b's does: layer ->
    # what its experts add to that channel. An engine that keeps the residual stream in f16 fails here.
    "loud": TINY | dict(massive={1: 40_000.0, 2: 60_000.0}),
    # Everything off the power-of-two grid, and every constant different from the release: catches tile-edge
    # bugs and hard-coded values (window, limit, eps, theta, YaRN range, layer order, head_dim, vocab).
    "odd": dict(hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_local_experts=7,
                num_experts_per_tok=3, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
                vocab_size=503, sliding_window=13, layer_types=[FULL, SLIDING, SLIDING],
                rms_norm_eps=1e-6, swiglu_limit=5.0,
                rope=dict(factor=8.0, original=256, theta=10000)),
}


def config_json(variant):
    """The variant as a config.json with the keys the released files have (transformers 4.55 spelling)."""
    c = {**RELEASE_KEYS, **VARIANTS[variant]}
    c.pop("massive", None)
    rope = c.pop("rope")
    c["rope_theta"] = rope["theta"]
    c["rope_scaling"] = dict(beta_fast=32.0, beta_slow=1.0, factor=rope["factor"],
                             original_max_position_embeddings=rope["original"], rope_type="yarn", truncate=False)
    c["initial_context_length"] = rope["original"]
    c["max_position_embeddings"] = int(rope["original"] * rope["factor"])
    c["experts_per_token"] = c["num_experts_per_tok"]
    c["eos_token_id"], c["pad_token_id"] = c["vocab_size"] - 2, c["vocab_size"] - 1
    return dict(sorted(c.items()))


# ---------------------------------------------------------------------------------------------- MXFP4

def mxfp4_encode(w):
    """w [..., K] float64 -> (blocks u8 [..., K/32, 16], scales u8 [..., K/32]).

    Scale byte = 127 + floor(log2(amax)) - 2 (E2M1's largest exponent is 2); elements round to nearest,
    ties to the even mantissa, saturating at 6. Element 2i sits in the low nibble of byte i.
    """
    v = w.reshape(*w.shape[:-1], w.shape[-1] // MXFP4_BLOCK, MXFP4_BLOCK)
    amax = np.abs(v).max(-1)
    exp = np.where(amax > 0, np.floor(np.log2(np.where(amax > 0, amax, 1))) - 2, -127)
    scales = np.clip(exp + 127, 0, 254).astype(np.uint8)
    mag = np.abs(v) / np.exp2(scales.astype(np.float64) - 127)[..., None]
    mid = (E2M1[1:] + E2M1[:-1]) / 2
    code = np.searchsorted(mid, mag, side="left")       # a tie stays on the lower code ...
    tie = (code < 7) & (mag == mid[np.minimum(code, 6)])
    code = code + (tie & (code % 2 == 1))               # ... unless that code's mantissa bit is odd
    code = (code + 8 * np.signbit(v)).astype(np.uint8)  # -0.0 keeps its sign: code 8
    return code[..., 0::2] | (code[..., 1::2] << 4), scales


def mxfp4_decode(blocks, scales):
    """Inverse of mxfp4_encode, to float32 [..., K]; scale byte 255 is NaN by the OCP MX specification."""
    code = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], MXFP4_BLOCK)
    value = np.where(code & 8, -E2M1[code & 7], E2M1[code & 7])
    scale = np.where(scales == 255, np.nan, np.exp2(scales.astype(np.float64) - 127))
    out = (value * scale[..., None]).astype(np.float32)
    return out.reshape(*blocks.shape[:-2], blocks.shape[-2] * MXFP4_BLOCK)


# --------------------------------------------------------------------------------------------- weights

MASSIVE_CHANNEL = 5


def make_massive(tensors, cfg, added):
    """Grow one residual channel by added[layer], and let later norms undo what that does to the others."""
    H, total = cfg["hidden_size"], 0.0
    usual = 4.0  # about the residual's rms in the deeper layers of these checkpoints without this

    def compensate(name):
        if total:
            scale = torch.full((H,), 2.0 ** round(math.log2(total / math.sqrt(H) / usual)), dtype=torch.bfloat16)
            scale[MASSIVE_CHANNEL] = 1 / 16
            tensors[name] = tensors[name] * scale

    for n in range(cfg["num_hidden_layers"]):
        compensate(f"model.layers.{n}.input_layernorm.weight")
        compensate(f"model.layers.{n}.post_attention_layernorm.weight")
        tensors[f"model.layers.{n}.mlp.experts.down_proj_bias"][:, MASSIVE_CHANNEL] += added.get(n, 0.0)
        total += added.get(n, 0.0)
    compensate("model.norm.weight")


def random_checkpoint(cfg, seed):
    """Name -> tensor for the whole checkpoint, in the order in which it is cut into shards."""
    rng = np.random.default_rng(seed)
    H, I, E = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    nq, nkv, d = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]

    def bf16(std, *shape, mean=0.0):
        return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32)).to(torch.bfloat16)

    def experts(std, rows, cols):
        w = std * rng.standard_normal((E, rows, cols))
        # Spread the block exponents over several binades, as trained weights do.
        spread = np.exp2(rng.integers(-2, 2, (E, rows, cols // MXFP4_BLOCK, 1)))
        w = (w.reshape(E, rows, -1, MXFP4_BLOCK) * spread).reshape(E, rows, cols)
        w[0, 0, :MXFP4_BLOCK] = 0.0                # an all-zero block: scale byte 0
        w[0, 1, :MXFP4_BLOCK] = -0.0               # an all-negative-zero block
        w[-1, -1, -MXFP4_BLOCK:] *= 2.0 ** -100    # a block whose scale byte is far from the others
        return tuple(torch.from_numpy(a) for a in mxfp4_encode(w))

    t = {}
    for n in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{n}."
        t[p + "input_layernorm.weight"] = bf16(0.2, H, mean=1.0)
        t[p + "self_attn.o_proj.bias"] = bf16(0.2, H)
        t[p + "self_attn.o_proj.weight"] = bf16(1.5 / math.sqrt(nq * d), H, nq * d)
        for name, heads, std in (("q", nq, 1.6), ("k", nkv, 1.6), ("v", nkv, 1.0)):
            t[p + f"self_attn.{name}_proj.bias"] = bf16(0.4, heads * d)
            t[p + f"self_attn.{name}_proj.weight"] = bf16(std / math.sqrt(H), heads * d, H)
        t[p + "self_attn.sinks"] = bf16(1.5, nq, mean=2.0)
        t[p + "mlp.router.bias"] = bf16(1.0, E)
        t[p + "mlp.router.weight"] = bf16(1.5 / math.sqrt(H), E, H)
        t[p + "mlp.experts.gate_up_proj_bias"] = bf16(1.0, E, 2 * I)
        t[p + "mlp.experts.gate_up_proj_blocks"], t[p + "mlp.experts.gate_up_proj_scales"] = \
            experts(3.0 / math.sqrt(H), 2 * I, H)
        t[p + "mlp.experts.down_proj_bias"] = bf16(0.4, E, H)
        t[p + "mlp.experts.down_proj_blocks"], t[p + "mlp.experts.down_proj_scales"] = \
            experts(0.2 / math.sqrt(I), H, I)
        t[p + "post_attention_layernorm.weight"] = bf16(0.2, H, mean=1.0)
    t["model.embed_tokens.weight"] = bf16(1.0, cfg["vocab_size"], H)
    t["model.norm.weight"] = bf16(0.2, H, mean=1.0)
    t["lm_head.weight"] = bf16(2.5 / math.sqrt(H), cfg["vocab_size"], H)
    return t


def write_tensors(path, tensors):
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    path.chmod(0o644)


def write_checkpoint(out, cfg, tensors):
    """config.json, two shards named as the release names them (00000-of-00001, ...), and the index."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    names = list(tensors)
    # Cut inside a layer, between a blocks tensor and its scales: a loader must join them across shards.
    cut = next(i for i, n in enumerate(names) if n == "model.layers.1.mlp.experts.gate_up_proj_scales")
    shards = {f"model-{i:05d}-of-00001.safetensors": part for i, part in enumerate((names[:cut], names[cut:]))}
    for file, part in shards.items():
        write_tensors(out / file, {n: tensors[n] for n in part})
    index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
             "weight_map": {n: file for file, part in shards.items() for n in part}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")


# ---------------------------------------------------------------------------------------------- oracle

def load_reference(path, dtype):
    from transformers import GptOssForCausalLM, Mxfp4Config
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    model = GptOssForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager",
                                              experts_implementation="eager", local_files_only=True,
                                              quantization_config=Mxfp4Config(dequantize=True))
    # transformers keeps the norms in float32 under float16 (not under bfloat16); all else is what was asked for.
    kept = {n: p.dtype for n, p in model.named_parameters() if p.dtype != dtype}
    assert all("norm" in n and dtype == torch.float16 for n in kept), kept
    return model.eval()


def check_loaded(model, tensors):
    """All of the checkpoint reached the model bit for bit; the experts through transformers' MXFP4 decoder."""
    params, expected = dict(model.named_parameters()), {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):  # the model holds [E, in, out], the checkpoint rows are outputs
            name = name.removesuffix("_blocks")
            decoded = mxfp4_decode(tensor.numpy(), tensors[name + "_scales"].numpy())
            expected[name] = torch.from_numpy(decoded).transpose(1, 2).contiguous()
        elif not name.endswith("_scales"):
            expected[name] = tensor.float()
    assert set(expected) == set(params), set(expected) ^ set(params)
    for name, want in expected.items():
        assert torch.equal(want.view(torch.int32), params[name].detach().view(torch.int32)), name
    return sum(t.numel() for n, t in expected.items() if n.endswith(("gate_up_proj", "down_proj")))


@torch.no_grad()
def trace(model, tokens):
    """One full-prompt forward without a KV cache: logits [T, V] and what every layer made, by name."""
    seen, hooks = {}, []

    def keep(name, pick=lambda out: out):
        def hook(_module, _args, out):
            seen[name] = pick(out).detach().reshape(len(tokens), -1).clone()
        return hook

    base = model.model
    hooks.append(base.embed_tokens.register_forward_hook(keep("embed")))
    for n, layer in enumerate(base.layers):
        hooks += [
            layer.self_attn.register_forward_hook(keep(f"layer{n}.attn_out", lambda o: o[0])),
            layer.mlp.router.register_forward_hook(keep(f"layer{n}.router_logits", lambda o: o[0])),
            layer.mlp.router.register_forward_hook(keep(f"layer{n}.topk_weight", lambda o: o[1])),
            layer.mlp.router.register_forward_hook(keep(f"layer{n}.topk_index", lambda o: o[2].int())),
            layer.mlp.register_forward_hook(keep(f"layer{n}.moe_out", lambda o: o[0])),
            layer.register_forward_hook(keep(f"layer{n}.hidden", lambda o: o[0] if isinstance(o, tuple) else o)),
        ]
    hooks.append(base.norm.register_forward_hook(keep("final_norm")))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for h in hooks:
        h.remove()
    return logits.detach().clone(), seen


@torch.no_grad()
def greedy(model, prompt):
    """GREEDY_TOKENS argmax steps with transformers' own KV cache; also the logits each was chosen from."""
    cache, ids, picked, rows = None, list(prompt), [], []
    for _ in range(GREEDY_TOKENS):
        out = model(torch.tensor([ids if cache is None else ids[-1:]]), past_key_values=cache, use_cache=True)
        cache, row = out.past_key_values, out.logits[0, -1].float()
        rows.append(row)
        picked.append(int(row.argmax()))
        ids.append(picked[-1])
    return picked, torch.stack(rows)


def margin(values, k):
    """Smallest gap, over rows, between the k-th and the (k+1)-th largest entry."""
    top = values.float().topk(k + 1, dim=-1).values
    return float((top[:, k - 1] - top[:, k]).min())


def clamped_share(model, tokens):
    """Shares of gate and up values that the clamp changes, to show that the fixture exercises it."""
    hit = {"gate": [0, 0], "up": [0, 0]}
    limit, hooks = model.config.swiglu_limit, []

    def wrap(experts):
        original = experts._apply_gate

        def counted(gate_up):
            g, u = gate_up[..., ::2], gate_up[..., 1::2]
            hit["gate"][0] += int((g > limit).sum()); hit["gate"][1] += g.numel()
            hit["up"][0] += int((u.abs() > limit).sum()); hit["up"][1] += u.numel()
            return original(gate_up)
        experts._apply_gate = counted
        hooks.append((experts, original))

    for layer in model.model.layers:
        wrap(layer.mlp.experts)
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    for experts, original in hooks:
        experts._apply_gate = original
    return {k: round(a / b, 4) for k, (a, b) in hit.items()}


def compare(a, b):
    """How far logits b are from golden logits a."""
    if not b.isfinite().all():
        return {"finite": False}
    a, b = a.double(), b.double()
    d = (a - b).abs()
    kl = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    return {"finite": True, "max_abs": float(d.max()), "max_abs_over_logit_std": float(d.max() / a.std()),
            "relative_l2": float((a - b).norm() / a.norm()),
            "max_kl": float(kl.max()), "argmax_agree": float((a.argmax(-1) == b.argmax(-1)).double().mean())}


def build(variant, seed, out):
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    cfg = config_json(variant)
    tensors = random_checkpoint(cfg, seed)
    make_massive(tensors, cfg, VARIANTS[variant].get("massive", {}))
    write_checkpoint(out, cfg, tensors)

    model = load_reference(out, torch.float32)
    checked = check_loaded(model, tensors)

    rng = np.random.default_rng(seed + 1)
    # No prompt holds the two highest ids (eos, pad).
    prompts = {f"p{n}": [int(x) for x in rng.integers(0, cfg["vocab_size"] - 2, n)] for n in PROMPT_LENGTHS}
    golden, info = {}, {"prompts": {}}
    low = {"bf16": load_reference(out, torch.bfloat16), "f16": load_reference(out, torch.float16)}
    layers, k = range(cfg["num_hidden_layers"]), cfg["num_experts_per_tok"]
    used = set()
    for name, tokens in prompts.items():
        logits, seen = trace(model, tokens)
        golden[f"{name}.logits"] = logits
        for key, value in seen.items():
            # The longest prompt keeps the residual stream and the routing only, to bound the file's size.
            if name != f"p{max(PROMPT_LENGTHS)}" or not key.endswith(("attn_out", "moe_out")):
                golden[f"{name}.{key}"] = value
        used |= {(n, int(e)) for n in layers for e in seen[f"layer{n}.topk_index"].unique()}
        picked, rows = greedy(model, tokens)
        uncached, every = trace(model, tokens + picked[:-1])
        uncached = uncached[len(tokens) - 1:]
        assert uncached.argmax(-1).tolist() == picked, "the KV cache changes the greedy tokens"
        if name == "p7":
            golden["p7.greedy_logits"] = rows
        info["prompts"][name] = {
            "tokens": tokens,
            "greedy": picked,
            # How close the nearest discrete decision was, over the prompt and its greedy continuation.
            "min_greedy_margin": margin(rows, 1),
            "min_router_margin": min(margin(every[f"layer{n}.router_logits"], k) for n in layers),
            "cached_vs_uncached_max_abs": float((uncached - rows).abs().max()),
        }
        for precision, other in low.items():
            low_logits, low_seen = trace(other, tokens)
            changed = sum(int((seen[f"layer{n}.topk_index"].sort(-1).values !=
                               low_seen[f"layer{n}.topk_index"].sort(-1).values).any(-1).sum()) for n in layers)
            same = next((i for i, (x, y) in enumerate(zip(picked, greedy(other, tokens)[0])) if x != y), GREEDY_TOKENS)
            info["prompts"][name][f"{precision}_vs_f32"] = compare(logits, low_logits) | {
                "routed_sets_changed": changed, "routed_sets": len(layers) * len(tokens),
                "greedy_tokens_equal": same}
    golden["rope.inv_freq"] = model.model.rotary_emb.inv_freq.float()
    for proj in ("gate_up_proj", "down_proj"):
        golden[f"dequant.layer0.expert0.{proj}"] = \
            getattr(model.model.layers[0].mlp.experts, proj)[0].detach().t().contiguous()

    all_logits = torch.cat([golden[f"{n}.logits"] for n in prompts])
    info = {
        "variant": variant, "seed": seed,
        "made_with": {"torch": torch.__version__, "transformers": __import__("transformers").__version__,
                      "numpy": np.__version__, "python": platform.python_version()},
        "rope_attention_scaling": float(model.model.rotary_emb.attention_scaling),
        "logit_std": float(all_logits.std()), "logit_max_abs": float(all_logits.abs().max()),
        "residual_max_abs": max(float(t.abs().max()) for n, t in golden.items() if n.endswith("hidden")),
        "clamped_share": clamped_share(model, prompts[f"p{max(PROMPT_LENGTHS)}"]),
        "experts_used": f"{len(used)} of {cfg['num_local_experts'] * len(layers)}",
        "dequantised_values_equal_to_transformers": checked,
        **info,
        "tensors": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in sorted(golden.items())},
    }
    write_tensors(out / "golden.safetensors", golden)
    (out / "golden.json").write_text(json.dumps(info, indent=1, allow_nan=False) + "\n")
    return info


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--config", choices=sorted(VARIANTS), default="tiny")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    info = build(args.config, args.seed, args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.config} seed {args.seed}: {size / 2**20:.2f} MiB, logit std {info['logit_std']:.3f}, "
          f"clamped {info['clamped_share']}, experts used {info['experts_used']}")
    for name, p in info["prompts"].items():
        print(f"  {name}: margin of router {p['min_router_margin']:.1e}, of greedy {p['min_greedy_margin']:.1e}; "
              f"KV cache moves logits by {p['cached_vs_uncached_max_abs']:.0e}")
        for precision in ("bf16", "f16"):
            c = p[f"{precision}_vs_f32"]
            if not c["finite"]:
                print(f"      {precision:4s} overflows: logits are not finite")
                continue
            print(f"      {precision:4s} max abs {c['max_abs']:.3f}, rel L2 {c['relative_l2']:.4f}, max KL {c['max_kl']:.4f}, "
                  f"argmax equal {c['argmax_agree']:.2f}, routes changed {c['routed_sets_changed']}/{c['routed_sets']}, "
                  f"greedy equal for {c['greedy_tokens_equal']}")


if __name__ == "__main__":
    main()
