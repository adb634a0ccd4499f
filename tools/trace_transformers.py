#!/usr/bin/env python3
"""Write a Fourfold trace from a Hugging Face transformers model: every stage of one forward pass, by hooks.

    python tools/trace_transformers.py --model DIR --tokens 1,2,3 -o reference.safetensors
    python tools/trace_transformers.py --model DIR --prompt "Once upon a time" --dtype bfloat16 -o reference.safetensors
    python tools/trace_transformers.py --self-check          # the writer alone; needs neither torch nor transformers

The file is `safetensors`; `docs/outside-traces.md` has the format. Each tensor is [tokens, width], F32 or, for expert
indices, I32. Knows GptOssForCausalLM; for another family add its hooks to `FAMILIES`.

Needs torch, transformers and accelerate. MXFP4 experts are decoded to --dtype by transformers itself.
"""
import argparse
import json
import os
import platform
import struct
import sys
import tempfile

FORMAT, VERSION = "fourfold-trace", "1"
WIDTHS = {"F32": 4, "I32": 4}


# ------------------------------------------------------------------------------------------ the writer, plain Python

def write(path, tensors, metadata, force=False):
    """Write `tensors`, a list of (name, dtype, [tokens, width], little-endian bytes), as safetensors.

    The file appears whole or not at all. An existing file is kept unless `force`.
    """
    header, offset = {"__metadata__": {key: str(value) for key, value in metadata.items()}}, 0
    for name, dtype, shape, data in tensors:
        want = WIDTHS[dtype]
        for n in shape:
            want *= n
        if len(data) != want:
            raise ValueError(f"{name}: {dtype} {list(shape)} takes {want} bytes, got {len(data)}")
        if name in header:
            raise ValueError(f"{name}: two tensors of one name")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    if not force and os.path.lexists(path):
        raise FileExistsError(f"{path} exists; --force replaces it")
    part = f"{path}.part-{os.getpid()}"
    try:
        with open(part, "xb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for _, _, _, data in tensors:
                file.write(data)
        if force:
            os.replace(part, path)
        else:
            os.link(part, path)  # unlike a rename, fails where a file has appeared meanwhile
    finally:
        if os.path.lexists(part):
            os.unlink(part)


def read(path):
    """The metadata and {name: (dtype, shape, bytes)} of a safetensors file. For the self-check."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    metadata = header.pop("__metadata__", {})
    return metadata, {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def self_check():
    """Write a small trace, read it back, and see that wrong input and existing files are refused."""
    floats = [0.0, -0.0, 1.5, -2.0, 3.4028234663852886e38, 1e-45]
    stages = [("embed", "F32", [2, 3], struct.pack("<6f", *floats)),
              ("layers.0.mlp.router.experts", "I32", [2, 2], struct.pack("<4i", 3, 1, 0, 2)),
              ("logits", "F32", [2, 1], struct.pack("<2f", float("inf"), 7.0))]
    facts = dict(format=FORMAT, version=VERSION, kind="full", engine="self-check", tokens="[5, 9]", note="Zürich")

    def refuses(error, text, *args, **options):
        try:
            write(*args, **options)
        except error as e:
            assert text in str(e), e
        else:
            raise AssertionError(f"{text!r} was not refused")

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.safetensors")
        write(path, stages, facts)
        metadata, tensors = read(path)
        assert metadata == facts, metadata
        assert tensors == {name: (dtype, shape, data) for name, dtype, shape, data in stages}, tensors
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        assert (8 + length) % 8 == 0 and os.path.getsize(path) == 8 + length + 24 + 16 + 8
        refuses(FileExistsError, "--force", path, stages, facts)
        write(path, stages[:1], facts, force=True)
        assert list(read(path)[1]) == ["embed"]
        refuses(ValueError, "takes 12 bytes", path, [("x", "F32", [3, 1], b"1234")], facts, force=True)
        refuses(ValueError, "two tensors", path, stages[:1] * 2, facts, force=True)
        assert os.listdir(folder) == ["trace.safetensors"], "a partial file stayed behind"
        try:  # where there is safetensors, it reads the file too
            from safetensors import safe_open
        except ImportError:
            print("safetensors is not installed: read back by our own reader only")
        else:
            with safe_open(path, "np") as file:
                assert file.metadata() == facts and list(file.keys()) == ["embed"]
            print("read back by safetensors as well")
    print("self-check passed")


# ------------------------------------------------------------------------------------------------- the hooks

def gpt_oss(model):
    """(module, stage, how to get the stage's value from what goes into the module and what comes out)."""
    base = model.model
    yield base.embed_tokens, "embed", output
    for n, layer in enumerate(base.layers):
        yield layer.input_layernorm, f"layers.{n}.attn_norm", output
        yield layer.self_attn.o_proj, f"layers.{n}.attention", lambda args, out: args[0]  # the heads, side by side
        yield layer.self_attn, f"layers.{n}.attn_out", output  # with o_proj, before the residual add
        yield layer.post_attention_layernorm, f"layers.{n}.mlp_norm", output
        yield layer.mlp.router, f"layers.{n}.mlp.router.logits", lambda args, out: out[0]
        yield layer.mlp.router, f"layers.{n}.mlp.router.weights", lambda args, out: out[1]
        yield layer.mlp.router, f"layers.{n}.mlp.router.experts", lambda args, out: out[2]
        yield layer.mlp, f"layers.{n}.mlp.out", output  # before the residual add
        yield layer, f"layers.{n}.hidden", output
    yield base.norm, "final_norm", output
    yield model.lm_head, "logits", output


def output(_args, out):
    return out[0] if isinstance(out, tuple) else out


# The architecture in config.json, and its hooks.
FAMILIES = {"GptOssForCausalLM": gpt_oss}


def record(model, hooks, tokens, device):
    """Run one forward pass without a KV cache and return the stages in the order in which they were made."""
    import torch
    stages, handles = {}, []

    def keep(stage, pick):
        def hook(_module, args, out):
            value = pick(args, out).detach().reshape(len(tokens), -1)
            whole = not value.is_floating_point()
            value = value.to("cpu", torch.int32 if whole else torch.float32).contiguous()
            if stage in stages:
                raise RuntimeError(f"{stage} was made twice in one pass")
            stages[stage] = ("I32" if whole else "F32", list(value.shape), value.numpy().tobytes())
        return hook

    for module, stage, pick in hooks:
        handles.append(module.register_forward_hook(keep(stage, pick)))
    try:
        with torch.no_grad():
            model(torch.tensor([tokens], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [stage for _, stage, _ in hooks if stage not in stages]
    if missing:
        raise RuntimeError(f"the model did not run the modules of {missing}")
    return [(stage, *value) for stage, value in stages.items()]


def trace(args):
    # A hub name would be downloaded, and its tokenizer may run code; a trace is of files that lie here.
    if not os.path.isfile(os.path.join(args.model, "config.json")):
        sys.exit(f"error: {args.model} has no config.json: --model is a folder with a checkpoint")
    if not args.force and os.path.lexists(args.output):
        sys.exit(f"error: {args.output} exists; --force replaces it")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        import transformers
    except ImportError as e:
        sys.exit(f"error: {e}; pip install torch transformers accelerate")
    with open(os.path.join(args.model, "config.json"), encoding="utf-8") as file:
        config_text = file.read()
    config = json.loads(config_text)
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in FAMILIES:
        sys.exit(f"error: no hooks for {architecture}; FAMILIES in this script has {', '.join(FAMILIES)}")
    if args.tokens:
        tokens = args.tokens
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        except (OSError, ValueError) as e:
            sys.exit(f"error: no tokenizer in {args.model}; give --tokens ({str(e).splitlines()[0]})")
        tokens = tokenizer.encode(args.prompt)
    outside = [t for t in tokens if not 0 <= t < config["vocab_size"]]
    if outside or not tokens:
        sys.exit(f"error: tokens must be 0..{config['vocab_size'] - 1} and at least one, got {outside or tokens}")
    options = dict(dtype=getattr(torch, args.dtype), attn_implementation="eager", local_files_only=True)
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        options["experts_implementation"] = "eager"
    model = getattr(transformers, architecture).from_pretrained(args.model, **options).eval().to(args.device)
    stages = record(model, list(FAMILIES[architecture](model)), tokens, args.device)
    metadata = dict(format=FORMAT, version=VERSION, kind="full", engine=f"transformers {transformers.__version__}",
                    model=os.path.basename(os.path.normpath(args.model)), dtype=args.dtype, device=args.device,
                    tokens=json.dumps(tokens), config=config_text, torch=torch.__version__,
                    transformers=transformers.__version__, python=platform.python_version())
    if args.prompt is not None:
        metadata["prompt"] = args.prompt
    write(args.output, stages, metadata, args.force)
    size = os.path.getsize(args.output)
    print(f"{args.output}: {len(stages)} stages of {len(tokens)} tokens, {size} bytes, {metadata['engine']}")


def ids(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-check", action="store_true", help="check the writer and stop")
    parser.add_argument("--model", metavar="DIR", help="folder with config.json and the weights")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="needs the folder's tokenizer")
    what.add_argument("--tokens", metavar="IDS", type=ids, help="token ids, as 1,2,3")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, mps")
    parser.add_argument("-o", "--output", metavar="FILE")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    args = parser.parse_args()
    if args.self_check:
        self_check()
    elif not (args.model and args.output and (args.tokens or args.prompt)):
        parser.error("give --model, --tokens or --prompt, and -o; or --self-check")
    else:
        trace(args)


if __name__ == "__main__":
    main()
