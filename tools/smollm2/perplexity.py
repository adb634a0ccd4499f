#!/usr/bin/env python3
"""Perplexity of a Hugging Face folder on a text file, by transformers on the CPU, as JSON.

    python tools/smollm2/perplexity.py --model smollm2 --text assets/alice.txt
    python tools/smollm2/perplexity.py --model smollm2 --text assets/alice.txt --dtype bfloat16 --window 256

The text is tokenised as a whole (what the tokenizer adds by itself, such as a first token, stays) and cut into windows of
--window tokens that do not overlap. Each window starts from an empty cache, and its first token is given, not predicted:
a window of n tokens counts n - 1. The last, shorter window counts if it has two tokens or more.
Perplexity is exp(sum of the negative log-likelihoods in nats / number of predicted tokens), the sum in float64.

--dtype is what is computed in (weights are converted on loading); log-softmax is in float64 either way.

Needs torch (2.15.0) and transformers (5.23.0).
"""
import argparse
import json
import math
import pathlib

import torch
import transformers


@torch.no_grad()
def measure(model, ids, window):
    """[sum of negative log-likelihoods, predicted tokens] of every window."""
    out = []
    for start in range(0, len(ids), window):
        part = torch.tensor([ids[start:start + window]])
        if part.shape[1] < 2:
            break
        logits = model(input_ids=part, use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits.double(), part[0, 1:], reduction="sum")
        out.append([nll.item(), part.shape[1] - 1])
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--model", required=True, help="Hugging Face folder with weights and tokenizer")
    a.add_argument("--text", type=pathlib.Path, required=True, help="UTF-8 text")
    a.add_argument("--window", type=int, default=512, help="tokens per window (default %(default)s)")
    a.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default %(default)s")
    a = a.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        a.model, dtype=getattr(torch, a.dtype), attn_implementation="eager").eval()
    ids = tokenizer(a.text.read_bytes().decode("utf-8"), verbose=False)["input_ids"]
    windows = measure(model, ids, a.window)
    nll, predicted = math.fsum(n for n, _ in windows), sum(n for _, n in windows)
    print(json.dumps({
        "text": a.text.name, "dtype": a.dtype, "window": a.window, "tokens": len(ids), "windows": len(windows),
        "predicted": predicted, "nll": nll, "mean_nll": nll / predicted, "perplexity": math.exp(nll / predicted),
        "nll_by_window": [round(n, 4) for n, _ in windows],
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
    }, indent=1))


if __name__ == "__main__":
    main()
