"""Writes a trained small model as a Hugging Face gpt-oss checkpoint with MXFP4 experts.

    export.py --weights w --tokenizer tokenizer.json --out model --name NAME --check

Tensor names and layouts are those of openai/gpt-oss-20b: `*_blocks` [experts, out, in/32, 16]
(two codes a byte, low nibble first), `*_scales` [experts, out, in/32] (E8M0), gate and up rows
interleaved, everything else bf16. Files over --max-shard MiB are split with an index, as the
published checkpoint is. --check loads the result in transformers and compares logits.

Needs torch, tokenizers and safetensors, and transformers for --check.
"""
import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import small_gptoss as net

# The chat template of the default model: Harmony without tools, in the form it was trained on.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


def tensors(model):
    """The model's weights under their published names, packed."""
    out = {}
    for name, p in model.state_dict().items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            at = f"model.layers.{layer}."
            if rest.startswith("router."):
                out[at + "mlp." + rest] = p.bfloat16()
            elif rest.startswith("experts."):
                part = rest.removeprefix("experts.")
                if part == "gate_up":                    # [E, 2, I, H] -> rows gate0, up0, gate1, ...
                    blocks, scales = net.mx_pack(p.transpose(1, 2).flatten(1, 2))
                    out[at + "mlp.experts.gate_up_proj_blocks"] = blocks
                    out[at + "mlp.experts.gate_up_proj_scales"] = scales
                elif part == "gate_up_bias":
                    out[at + "mlp.experts.gate_up_proj_bias"] = p.transpose(1, 2).flatten(1, 2).bfloat16()
                elif part == "down":
                    blocks, scales = net.mx_pack(p)
                    out[at + "mlp.experts.down_proj_blocks"] = blocks
                    out[at + "mlp.experts.down_proj_scales"] = scales
                else:
                    out[at + "mlp.experts.down_proj_bias"] = p.bfloat16()
            else:
                out[at + rest] = p.bfloat16()
        elif name == "lm_head.weight":
            out[name] = p.bfloat16()
        else:
            out["model." + name] = p.bfloat16()
    return {k: v.contiguous() for k, v in out.items()}


def config(c, token):
    """config.json of net.Config c; `token` gives the id of a special token."""
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "attention_bias": True, "attention_dropout": 0.0,
        "bos_token_id": token("<|startoftext|>"), "eos_token_id": token("<|return|>"),
        "pad_token_id": token("<|endoftext|>"),
        "experts_per_token": c.top_k, "num_experts_per_tok": c.top_k, "num_local_experts": c.experts,
        "head_dim": c.head_dim, "hidden_act": "silu", "hidden_size": c.hidden,
        "initial_context_length": c.context, "max_position_embeddings": c.context,
        "initializer_range": 0.02, "intermediate_size": c.inner,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(c.layers)],
        "num_attention_heads": c.heads, "num_hidden_layers": c.layers, "num_key_value_heads": c.kv_heads,
        "output_router_logits": False, "rms_norm_eps": c.eps, "rope_theta": c.theta,
        "rope_scaling": {"rope_type": "yarn", "factor": c.yarn_factor, "beta_fast": 32.0, "beta_slow": 1.0,
                         "truncate": False, "original_max_position_embeddings": c.yarn_original},
        "router_aux_loss_coef": 0.01, "sliding_window": c.window, "swiglu_limit": c.limit,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": c.vocab,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                       "model.embed_tokens", "lm_head"]},
    }


def write(path, value):
    """Writes `value` as JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--weights", required=True, help="folder that train.py wrote")
    a.add_argument("--tokenizer", required=True, help="tokenizer.json it was trained with")
    a.add_argument("--out", required=True, help="folder to write; its model*.safetensors* are replaced")
    a.add_argument("--name", default="", help="name of the model, kept in config.json")
    a.add_argument("--max-shard", type=float, default=15.0, help="largest weights file, MiB (default %(default)s)")
    a.add_argument("--check", action="store_true", help="compare with transformers")
    a = a.parse_args()
    tok = Tokenizer.from_file(a.tokenizer)
    model = net.load_weights(a.weights)
    out = pathlib.Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    every = tensors(model)
    shards, size = [{}], 0
    for name, t in every.items():
        if shards[-1] and size + t.nbytes > a.max_shard * 2**20:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    files = (["model.safetensors"] if len(shards) == 1 else
             [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)])
    for name, shard in zip(files, shards):
        save_file(shard, out / name, metadata={"format": "pt"})
    if len(shards) > 1:
        write(out / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(t.nbytes for t in every.values())},
            "weight_map": {k: f for f, s in zip(files, shards) for k in s}})
    conf = config(model.c, tok.token_to_id)
    if a.name:
        conf["_name_or_path"] = a.name
    write(out / "config.json", conf)
    write(out / "generation_config.json", {
        "bos_token_id": tok.token_to_id("<|startoftext|>"), "do_sample": True, "temperature": 0.7, "top_p": 0.9,
        "eos_token_id": [tok.token_to_id(t) for t in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": tok.token_to_id("<|endoftext|>")})
    (out / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copyfile(a.tokenizer, out / "tokenizer.json")
    write(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>", "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "model_max_length": model.c.context,
        "model_input_names": ["input_ids", "attention_mask"]})
    total = sum(f.stat().st_size for f in out.iterdir())
    print(f"{len(every)} tensors, {total / 2**20:.2f} MiB -> {out} ({', '.join(files)})")
    if a.check:
        check(model, every, out)


@torch.no_grad()
def check(model, every, out):
    """Fails unless the packed experts are what training rounded to, and transformers agrees on the logits."""
    # Own round trip first: the packed codes must be the very values training rounded to.
    model.round_experts(True)
    for i, b in enumerate(model.layers):
        at = f"model.layers.{i}.mlp.experts."
        for part, mine in zip(("gate_up_proj", "down_proj"),
                              (net.mx_round(b.experts.gate_up), net.mx_round(b.experts.down))):
            back = net.mx_unpack(every[f"{at}{part}_blocks"], every[f"{at}{part}_scales"])
            mine = mine.transpose(1, 2).flatten(1, 2) if part == "gate_up_proj" else mine
            assert torch.equal(back, mine), f"layer {i} {part}: packed values differ"
    ids = torch.randint(9, model.c.vocab, (2, min(model.c.context, 3 * model.c.window)))
    mine = model.eval()(ids)
    from transformers import GptOssForCausalLM, Mxfp4Config
    theirs = GptOssForCausalLM.from_pretrained(
        out, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32,
        attn_implementation="eager").float().eval()
    other = theirs(ids).logits
    err = ((mine - other).norm() / other.norm()).item()
    top = (mine.argmax(-1) == other.argmax(-1)).float().mean().item()
    print(f"against transformers: relative difference {err:.2e}, same best token {100 * top:.2f} %")
    assert err < 2e-2, "the logits disagree"


if __name__ == "__main__":
    main()
