#!/usr/bin/env python3
"""Builds tiny random dense checkpoints, Qwen3 and Llama, and golden outputs for them, with transformers' own classes.

    python tools/oracle/dense.py --out tests/fixtures/dense            # both families, in ten seconds

The weights are drawn here, rounded to bf16 and written by save_pretrained; the goldens come from the checkpoint as loaded
back from disk, in float32 on the CPU with eager attention. Nothing here re-implements a model. Prompts are drawn anew
until 32 greedy tokens win by --margin or more, with and without KV cache.

| family | what it has |
| --- | --- |
| `qwen3` | norms on q and k, head_dim of its own (4 heads of 32 on hidden 96), head apart from the embeddings |
| `llama` | llama3 RoPE scaling that bends inside the head (64 positions, factor 8), biases in attention, tied head |

Needs torch (2.15.0), transformers (5.23.0) and safetensors (0.8.0).
"""
import argparse
import copy
import json
import os
import pathlib
import platform
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB, HIDDEN, LAYERS = 512, 96, 3
SPECIAL = dict(bos_token_id=509, eos_token_id=510, pad_token_id=511)
LENGTHS = (1, 7, 33, 70)
FULL = 33  # prompts up to this length have every position and the intermediates; longer ones the last rows of the logits
LAST_ROWS = 16
GREEDY = 32
LOGIT_RMS = 1.5
COMMON = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
              num_key_value_heads=2, hidden_act="silu", max_position_embeddings=4096, **SPECIAL)
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(
        head_dim=32, intermediate_size=160, rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})),
    "llama": (LlamaForCausalLM, LlamaConfig, dict(
        head_dim=24, intermediate_size=192, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=False,
        tie_word_embeddings=True, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64})),
}


@torch.no_grad()
def draw(family, seed):
    """A random model of the family; every value is one that bf16 holds."""
    cls, config, keys = FAMILIES[family]
    model = cls(config(**COMMON, **keys, attn_implementation="eager")).eval()
    gen = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        r = torch.randn(p.shape, generator=gen)
        if "norm" in name:
            p.copy_(1 + 0.2 * r)
        elif name.endswith("bias"):
            p.copy_(0.3 * r)
        elif "embed_tokens" in name:
            p.copy_(0.5 * r)
        else:
            p.copy_(1.3 * r / p.shape[-1] ** 0.5)
    ids = torch.randint(0, min(SPECIAL.values()), (4, 48), generator=gen)
    model.model.norm.weight *= LOGIT_RMS / model(input_ids=ids, use_cache=False).logits.pow(2).mean().sqrt()
    return model.bfloat16()


@torch.no_grad()
def trace(model, ids):
    """One forward over a whole prompt: the logits and every intermediate named in the README."""
    seen, hooks = {}, []

    def keep(module, key):
        def hook(_, __, out):
            seen[key] = (out[0] if isinstance(out, tuple) else out)[0]
        hooks.append(module.register_forward_hook(hook))

    keep(model.model.embed_tokens, "hidden.0")
    for n, layer in enumerate(model.model.layers):
        keep(layer.self_attn, f"attn_out.{n}")
        keep(layer.mlp, f"mlp_out.{n}")
        keep(layer, f"hidden.{n + 1}")
    seen["logits"] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for h in hooks:
        h.remove()
    return seen


@torch.no_grad()
def greedy(model, ids, cached):
    """GREEDY tokens, whatever the end token, and the smallest distance between the best logit and the next."""
    feed, past, out, margin = torch.tensor([ids]), None, [], float("inf")
    for _ in range(GREEDY):
        r = model(input_ids=feed, past_key_values=past, use_cache=cached)
        best, token = r.logits[0, -1].topk(2)
        out.append(int(token[0]))
        margin = min(margin, float(best[0] - best[1]))
        step = torch.tensor([[out[-1]]])
        feed, past = (step, r.past_key_values) if cached else (torch.cat([feed, step], 1), None)
    return out, margin


def choose(model, gen, length, want):
    """A prompt of this length with a clear and varied greedy continuation: (prompt, tokens, margin, prompts drawn)."""
    for tries in range(1, 1001):
        ids = torch.randint(0, min(SPECIAL.values()), (length,), generator=gen).tolist()
        tokens, margin = greedy(model, ids, cached=True)
        if margin >= want and len(set(tokens)) >= GREEDY // 4 and greedy(model, ids, cached=False)[0] == tokens:
            return ids, tokens, margin, tries
    raise SystemExit(f"no prompt of length {length} continues clearly; try another seed")


def distance(other, ids, logits):
    """How far the same model in another precision is from `logits`."""
    d = trace(other, ids)["logits"].double() - logits.double()
    return {"max_abs": float(d.abs().max()), "relative_l2": float(d.norm() / logits.double().norm())}


def build(family, seed, want, out):
    """Writes the folder `out`; returns what golden.json says."""
    shutil.rmtree(out, ignore_errors=True)
    drawn = draw(family, seed)
    drawn.save_pretrained(out)
    model = FAMILIES[family][0].from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    for (name, a), b in zip(model.named_parameters(), drawn.parameters()):
        assert torch.equal(a, b.float()), f"{name} changed on its way through the file"
    wide, low = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()

    gen = torch.Generator().manual_seed(seed + 1)
    golden = {"rope.inv_freq": model.model.rotary_emb.inv_freq.float()}
    prompts, squares = {}, []
    for i, length in enumerate(LENGTHS):
        if length <= FULL:
            ids, tokens, margin, tries = choose(model, gen, length, want)
            prompts[f"p{i}"] = {"tokens": ids, "greedy": tokens, "min_greedy_margin": margin, "prompts_drawn": tries}
        else:
            ids = torch.randint(0, min(SPECIAL.values()), (length,), generator=gen).tolist()
            prompts[f"p{i}"] = {"tokens": ids}
        seen = trace(model, ids)
        squares.append(seen["logits"].pow(2).mean())
        prompts[f"p{i}"] |= {"f64_vs_f32": distance(wide, ids, seen["logits"]),
                             "bf16_vs_f32": distance(low, ids, seen["logits"])}
        golden[f"p{i}.input_ids"] = torch.tensor(ids, dtype=torch.int32)
        if length <= FULL:
            golden |= {f"p{i}.{key}": value for key, value in seen.items()}
        else:
            golden[f"p{i}.logits"] = seen["logits"][-LAST_ROWS:]
    save_file({k: v.detach().contiguous().clone() for k, v in golden.items()}, out / "golden.safetensors",
              metadata={"format": "pt"})
    info = {
        "family": family, "seed": seed,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__,
                      "python": platform.python_version()},
        "logit_rms": float(torch.stack(squares).mean().sqrt()), "prompts": prompts,
    }
    (out / "golden.json").write_text(json.dumps(info, indent=1, allow_nan=False) + "\n")
    return info


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--out", type=pathlib.Path, required=True, help="folder to write the families' folders into")
    a.add_argument("--family", choices=sorted(FAMILIES), action="append", help="only this one; may be repeated")
    a.add_argument("--seed", type=int, default=21, help="default %(default)s")
    a.add_argument("--margin", type=float, default=0.02, help="least distance of a greedy token (default %(default)s)")
    a = a.parse_args()
    torch.set_num_threads(1)  # the same bytes every time
    transformers.utils.logging.disable_progress_bar()
    for family in a.family or FAMILIES:
        out = a.out / family
        info = build(family, a.seed, a.margin, out)
        size = sum(f.stat().st_size for f in out.iterdir())
        print(f"{family}: {size / 1e6:.3f} MB, logit rms {info['logit_rms']:.3f}")
        for name, p in info["prompts"].items():
            f64, bf16 = p["f64_vs_f32"], p["bf16_vs_f32"]
            print(f"  {name}: {len(p['tokens'])} tokens, greedy margin {p.get('min_greedy_margin', float('nan')):.3f} after "
                  f"{p.get('prompts_drawn', '-')} prompts; f64 within {f64['max_abs']:.1e}, "
                  f"bf16 within {bf16['max_abs']:.3f} ({bf16['relative_l2']:.4f})")


if __name__ == "__main__":
    main()
