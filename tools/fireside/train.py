"""Trains a small gpt-oss model on what make_corpus.py packed. One GPU, in one piece or several.

    train.py --data packed --tokenizer tokenizer.json --config main --out w --minutes 5 --drop 0.1 --last

    train.py ... --state s.pt --minutes 9.3 --total-minutes 17.5     # a first piece of a longer plan
    train.py ... --state s.pt --minutes 9.3 --last                   # goes on, ends with the piece

--state holds everything (float32 weights, optimizer), so that a later piece can go on; --out gets
bf16 weights in files of at most 15 MiB, which export.py reads, and which --teacher distils from.
Learning rate, text mix and the switch to MXFP4-rounded experts follow the share of the planned
training time that is spent, so a run always ends fully annealed.

On a GPU, FlexAttention and grouped products are tried against the plain ways first, and kept where
they agree and are faster. Without a GPU it runs too, at toy size: --config toy --steps 20.

Needs numpy, torch, tokenizers and safetensors.
"""
import argparse
import json
import math
import pathlib
import queue
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import small_gptoss as net


class Text:
    """Windows of context+1 tokens. Each starts with a whole document and is filled with more."""

    def __init__(self, path, seed):
        data = np.load(path)
        self.ids, sizes, core = data["ids"], data["sizes"].astype(np.int64), data["core"]
        self.ends = np.cumsum(sizes)
        self.starts = self.ends - sizes
        self.pools = [np.flatnonzero(core), np.flatnonzero(~core)]
        self.rng = np.random.default_rng(seed)
        self.order = [self.rng.permutation(p) for p in self.pools]
        self.at, self.epochs = [0, 0], [0, 0]

    def next_doc(self, core_share):
        """(start, end) of the next document: a core one with probability core_share."""
        pool = 0 if self.rng.random() < core_share else 1
        if not len(self.pools[pool]):
            pool = 1 - pool
        if self.at[pool] == len(self.order[pool]):
            self.order[pool] = self.rng.permutation(self.pools[pool])
            self.at[pool], self.epochs[pool] = 0, self.epochs[pool] + 1
        doc = self.order[pool][self.at[pool]]
        self.at[pool] += 1
        return self.starts[doc], self.ends[doc]

    def window(self, out, core_share):
        """Fills `out` with documents; the last one is cut."""
        filled = 0
        while filled < len(out):
            a, b = self.next_doc(core_share)
            room = len(out) - filled
            if filled == 0 and b - a > room and self.rng.random() < 0.5:
                a += self.rng.integers(0, b - a - room + 1)       # the later part of a long one
            take = min(room, b - a)
            out[filled:filled + take] = self.ids[a:a + take]
            filled += take

    def batch(self, rows, length, core_share):
        """Token ids [rows, length + 1]: inputs and, one further, targets."""
        out = np.empty((rows, length + 1), np.int64)
        for r in out:
            self.window(r, core_share)
        return torch.from_numpy(out)


def orthogonal(g, steps=5):
    """The nearest matrix with equal singular values, by a quintic iteration (batched)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = g.shape[-2] > g.shape[-1]
    x = (g.mT if flip else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal; scaled so that its size is like that of an Adam step."""

    def __init__(self, params, lr, decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, decay=decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                            # one batched iteration a shape
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(mean, group["momentum"])
                alike.setdefault(p.shape, []).append((p, g))
            for shape, some in alike.items():
                steps = orthogonal(torch.stack([g for _, g in some]).flatten(0, -3))
                size = 0.2 * math.sqrt(max(shape[-2:]))
                for (p, _), step in zip(some, steps.view(len(some), *shape).to(some[0][0].dtype)):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(step, alpha=-group["lr"] * size)


def plan(progress):
    """Share of the time spent -> (learning rate factor, share of core text, experts rounded)."""
    rate = min(1.0, progress / 0.02 + 0.01) * min(1.0, (1 - progress) / 0.45)
    core = 0.45 + 0.5 * min(1.0, max(0.0, (progress - 0.5) / 0.4))
    return max(rate, 0.0), core, progress > 0.65


@torch.no_grad()
def val_loss(model, text, rows, context, batches, device):
    """Mean cross-entropy (nats a token) on the same held-out windows every time."""
    model.eval()
    text.rng = np.random.default_rng(0)
    text.order, text.at = [np.sort(p) for p in text.pools], [0, 0]
    total = 0.0
    for _ in range(batches):
        ids = text.batch(rows, context, 1.0).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids[:, :-1])
        total += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).item()
    model.train()
    return total / batches


@torch.no_grad()
def sample(model, tok, prompt, new, device, temperature=0.7, top_p=0.9):
    """Continues `prompt` by up to `new` tokens; returns the whole text. Plain and slow: no cache."""
    ids = tok.encode(prompt, add_special_tokens=False).ids
    stop = {tok.token_to_id(t) for t in ("<|return|>", "<|endoftext|>", "<|end|>")}
    for _ in range(min(new, model.c.context - len(ids))):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(torch.tensor([ids], device=device))[0, -1].float()
        p = torch.softmax(logits / temperature, -1)
        p, index = p.sort(descending=True)
        p[p.cumsum(0) - p > top_p] = 0
        pick = index[torch.multinomial(p, 1)].item()
        if pick in stop:
            break
        ids.append(pick)
    return tok.decode(ids, skip_special_tokens=False)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--data", required=True, help="folder that make_corpus.py pack wrote")
    a.add_argument("--tokenizer", required=True, help="tokenizer.json it was packed with")
    a.add_argument("--config", default="main", choices=net.CONFIGS, help="sizes of the model (default %(default)s)")
    a.add_argument("--out", required=True, help="folder for the trained bf16 weights")
    a.add_argument("--state", default="", help="file to go on from where it exists, and to keep everything in")
    a.add_argument("--init", default="", help="folder of bf16 weights to go on from (no --state there)")
    a.add_argument("--teacher", default="", help="folder of bf16 weights to distil from")
    a.add_argument("--minutes", type=float, default=9.3, help="wall time of this piece (default %(default)s)")
    a.add_argument("--total-minutes", type=float, default=17.5,
                   help="planned training time, all pieces (default %(default)s)")
    a.add_argument("--last", action="store_true", help="end the plan with this piece")
    a.add_argument("--rows", type=int, default=64, help="windows a step (default %(default)s)")
    a.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate (default %(default)s)")
    a.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices (default %(default)s)")
    a.add_argument("--drop", type=float, default=0.05, help="dropout (default %(default)s)")
    a.add_argument("--balance", type=float, default=0.01,
                   help="weight of the load-balancing loss (default %(default)s)")
    a.add_argument("--kernels", default="auto",
                   help="auto, or ATTENTION,EXPERTS: sdpa or flex, dense or grouped (default %(default)s)")
    a.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    a.add_argument("--steps", type=int, default=0, help="stop after so many steps (smoke test)")
    a.add_argument("--seed", type=int, default=1, help="of weights and text order (default %(default)s)")
    a = a.parse_args()
    began = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    tok = Tokenizer.from_file(a.tokenizer)
    c = net.CONFIGS[a.config]
    c.vocab = tok.get_vocab_size()
    model = (net.load_weights(a.init) if a.init else net.Model(c)).to(device)
    c = model.c
    teacher = net.load_weights(a.teacher).to(device).eval() if a.teacher else None
    how = tuple(a.kernels.split(",")) if a.kernels != "auto" else \
        net.pick_kernels(c, device, min(a.rows, 16), c.context)
    for limit in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 64)
    model.use(*how)
    model.set_drop(a.drop)
    if teacher is not None:
        teacher.use(*how)
        teacher.round_experts(True)
        teacher.requires_grad_(False)
    matrices = [p for n, p in model.layers.named_parameters()
                if p.dim() >= 2 and "bias" not in n and "router" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    opts = [Muon(matrices, a.lr, a.decay),
            torch.optim.AdamW([{"params": [p for p in rest if p.dim() >= 2 and p.shape[-1] > 1], "weight_decay": 0.01},
                               {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}],
                              lr=a.lr, betas=(0.9, 0.95), eps=1e-10)]
    spent, step, seen = 0.0, 0, 0
    if a.state and pathlib.Path(a.state).exists():
        s = torch.load(a.state, map_location=device, weights_only=False)
        model.load_state_dict(s["model"])
        for o, kept in zip(opts, s["opts"]):
            o.load_state_dict(kept)
        spent, step, seen = s["spent"], s["step"], s["seen"]
        print(f"goes on at step {step}, {spent:.0f} s", flush=True)
    n = sum(p.numel() for p in model.parameters())
    ex = sum(p.numel() for b in model.layers for p in (b.experts.gate_up, b.experts.down))
    live = n - ex + ex * c.top_k // c.experts - model.embed_tokens.weight.numel()
    print(f"{a.config}: {n / 1e6:.2f} M parameters, {ex / 1e6:.2f} M in experts, {live / 1e6:.2f} M "
          f"used a token; packed about {(ex * 4.25 / 8 + (n - ex) * 2) / 2**20:.1f} MiB", flush=True)

    text = Text(pathlib.Path(a.data) / "train.npz", a.seed + step)
    held = Text(pathlib.Path(a.data) / "val.npz", 0)
    share = [plan(0.0)[1]]
    ready = queue.Queue(8)

    def feed():
        while True:
            ids = text.batch(a.rows, c.context, share[0])
            ready.put(ids.pin_memory() if device == "cuda" else ids)
    threading.Thread(target=feed, daemon=True).start()

    def loss_of(ids):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            h, balance, shares = model.hidden(ids[:, :-1])
            logits = model.lm_head(h)
        logits, target = logits.float().flatten(0, 1), ids[:, 1:].flatten()
        ce = F.cross_entropy(logits, target)
        loss = ce
        if teacher is not None:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                aim = teacher(ids[:, :-1]).float().flatten(0, 1).log_softmax(-1)
            loss = 0.25 * ce + 0.75 * F.kl_div(logits.log_softmax(-1), aim, log_target=True,
                                               reduction="batchmean")
        return loss + a.balance * balance, ce.detach(), shares.detach()

    compiled = not a.no_compile and device == "cuda"
    if compiled:
        for b in model.layers:
            b.compile()
        if teacher is not None:
            for b in teacher.layers:
                b.compile()

    def train_step(progress):
        rate, share[0], rounded = plan(progress)
        model.round_experts(rounded)
        for o in opts:
            for g in o.param_groups:
                g["lr"] = a.lr * rate
        loss, ce, shares = loss_of(ready.get().to(device, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        return ce, shares

    model.train()
    total = a.total_minutes * 60
    deadline = began + a.minutes * 60 - 20                        # 20 s for the end: loss, samples, files
    # The first steps compile; both forms of the experts are compiled before the clock starts.
    if compiled:
        for on in (True, False):
            model.round_experts(on)
            loss_of(ready.get().to(device))[0].backward()
        for o in opts:
            o.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        print(f"compiled after {time.time() - began:.0f} s", flush=True)
    if a.last:
        total = spent + max(1.0, deadline - time.time())
    looked = time.time()
    mark, told, first, ce_sum, ce_n = time.time(), time.time(), step, torch.zeros((), device=device), 0
    base, tokens0 = spent, seen
    while True:
        spent = base + time.time() - mark
        progress = min(1.0, step / a.steps) if a.steps else min(1.0, spent / total)
        if progress >= 1 or time.time() > deadline or (a.steps and step - first >= a.steps):
            break
        ce, shares = train_step(progress)
        ce_sum, ce_n = ce_sum + ce, ce_n + 1
        step, seen = step + 1, seen + a.rows * c.context
        if step % 20 == 0 and time.time() - told > 15 or a.steps:
            told = time.time()
            use = shares.cpu() * c.experts
            print(f"step {step} {100 * progress:.1f} % loss {ce_sum.item() / ce_n:.4f} rate {plan(progress)[0]:.2f} "
                  f"{'mxfp4 ' if plan(progress)[2] else ''}{(seen - tokens0) / (time.time() - mark) / 1e6:.2f} Mtok/s "
                  f"expert load {use.min():.2f}..{use.max():.2f} epochs {text.epochs[0]},{text.epochs[1]}", flush=True)
            ce_sum, ce_n = torch.zeros((), device=device), 0
            if time.time() - looked > 45 and not a.steps:
                looked = time.time()                              # same dropout as in training: comparable
                ids = [held.batch(a.rows, c.context, 1.0).to(device) for _ in range(2)]
                print(f"  held-out core text: {sum(loss_of(x)[1].item() for x in ids) / 2:.4f}", flush=True)
        elif step % 8 == 0 and device == "cuda":
            torch.cuda.synchronize()                              # keeps the host close to the device
    if device == "cuda":
        torch.cuda.synchronize()
    if a.state:
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts],
                    "spent": spent, "step": step, "seen": seen}, a.state)
    net.save_weights(model, a.out)
    report = {"config": a.config, "parameters": n, "steps": step, "tokens": seen, "seconds": round(spent)}
    # Fresh and uncompiled, from the bf16 files: what the export will see.
    model = net.load_weights(a.out).to(device).eval()
    for rounded in (False, True):
        model.round_experts(rounded)
        report["val_mxfp4" if rounded else "val"] = round(
            val_loss(model, held, min(a.rows, 16), c.context, 1 if a.steps else 8, device), 4)
    print(json.dumps(report), flush=True)
    (pathlib.Path(a.out) / "report.json").write_text(json.dumps(report) + "\n")
    model.eval()
    for prompt in ("Tell me a short story about a fox and a lantern.", "Why is the sky blue?", None):
        start = ("Once upon a time, there was a little" if prompt is None else
                 f"<|start|>user<|message|>{prompt}<|end|><|start|>assistant<|channel|>final<|message|>")
        print("-----\n" + sample(model, tok, start, 16 if a.steps else 160, device), flush=True)


if __name__ == "__main__":
    main()
