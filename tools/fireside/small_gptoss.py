"""The gpt-oss network in plain PyTorch, for training small models with MXFP4 experts.

Same arithmetic as the published architecture: RMSNorm, grouped-query attention with learned
sinks and a sliding window in every other layer, rotary positions (rotate-half), router with
bias, softmax over the top-k logits, clamped SwiGLU (alpha 1.702, limit 7), biases everywhere.
Expert matrices are kept as [experts, out, in]; MX blocks of 32 run along `in`.

A module of train.py and export.py, not a program. Needs torch and safetensors.
"""
import inspect
import json
import math
import pathlib
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


@dataclass
class Config:
    """The sizes of a model. The defaults are those of the default model."""
    vocab: int = 4096
    hidden: int = 320
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 16
    top_k: int = 4
    inner: int = 160
    window: int = 128
    context: int = 1024
    theta: float = 150000.0
    yarn_factor: float = 32.0           # the published YaRN numbers, so the same code path is used
    yarn_original: int = 4096
    limit: float = 7.0
    eps: float = 1e-5

    def check(self):
        """Refuses widths that do not split into MX blocks."""
        for name in ("hidden", "inner"):
            if getattr(self, name) % 32:
                raise SystemExit(f"{name} must be a multiple of 32")
        return self


CONFIGS = {
    "main": Config(),
    "draft": Config(hidden=128, layers=4, heads=2, kv_heads=1, experts=8, top_k=2, inner=128),
    "toy": Config(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, experts=4, top_k=2,
                  inner=32, window=16, context=128),
}

# ---------------------------------------------------------------- MXFP4

try:
    from torch.nn.attention import flex_attention as fa
    HAS_AUX = "return_aux" in inspect.signature(fa.flex_attention).parameters
except ImportError:
    fa, HAS_AUX = None, False

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mx_parts(w):
    """w [..., in] -> (4-bit codes [..., in], exponents [..., in/32]), in float32.

    The exponent is the least one for which no value of the block is beyond 6: nothing is clipped.
    """
    blocks = w.float().unflatten(-1, (-1, 32))
    top = blocks.abs().amax(-1, keepdim=True)
    # frexp is exact: top / 6 = m * 2^e with m in [0.5, 1), so 2^e covers it (2^(e-1) when m = 0.5).
    m, e = torch.frexp(top / 6)
    e = torch.where(m == 0.5, e - 1, e)
    e = torch.where(top == 0, -127, e).clamp(-127, 127)
    x = torch.ldexp(blocks, -e).abs().clamp(max=6)
    # Nearest grid value, ties to the even code: step 0.5 below 2, 1 below 4, 2 above.
    y = torch.where(x < 2, torch.round(x * 2) / 2,
                    torch.where(x < 4, torch.round(x), torch.round(x / 2) * 2))
    return blocks, y, e


def mx_round(w):
    """w as MXFP4 would give it back."""
    blocks, y, e = mx_parts(w)
    return torch.ldexp(torch.copysign(y, blocks), e).flatten(-2).to(w.dtype)


def mx_pack(w):
    """w [..., in] -> (blocks uint8 [..., in/32, 16], scales uint8 [..., in/32]); low nibble first."""
    blocks, y, e = mx_parts(w)
    grid = torch.tensor(GRID, device=w.device)
    code = torch.searchsorted(grid, y.contiguous()).to(torch.uint8)
    code = code | (torch.signbit(blocks).to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4), (e.squeeze(-1) + 127).to(torch.uint8)


def mx_unpack(blocks, scales):
    """The inverse of mx_pack, in float32."""
    grid = torch.tensor(GRID + tuple(-g for g in GRID), device=blocks.device)
    code = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    return torch.ldexp(grid[code], (scales.int() - 127)[..., None]).flatten(-2)


# ---------------------------------------------------------------- attention

def mask_table(t, window, device):
    """Booleans [t, t]: may query i see key j. The window counts the query itself; 0 is no window."""
    i = torch.arange(t, device=device)
    keep = i[:, None] >= i
    if window:
        keep &= i[:, None] - i < window
    return keep


def sdpa_sinks(q, k, v, sinks, keep):
    """The sink is one more key of value 0; a spare head dimension carries its logit."""
    b, h, t, d = q.shape
    spare = q.new_zeros(b, h, t, 8)
    one = F.pad(q.new_ones(b, h, t, 1), (0, 7))
    sink = F.pad((sinks.to(q.dtype) * math.sqrt(d)).view(1, h, 1, 1).expand(b, h, 1, 1), (d, 7))
    q, k = torch.cat([q, one], -1), torch.cat([sink, torch.cat([k, spare], -1)], 2)
    v = F.pad(v, (0, 8, 1, 0))
    keep = F.pad(keep, (1, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, keep, scale=d ** -0.5)[..., :d]


def flex_sinks(q, k, v, sinks, block_mask):
    """softmax over (scores, sink) is the plain softmax times sigmoid(logsumexp - sink)."""
    if HAS_AUX:
        out, aux = fa.flex_attention(q, k, v, block_mask=block_mask, scale=q.shape[-1] ** -0.5,
                                     return_aux=fa.AuxRequest(lse=True))
        lse = aux.lse
    else:
        out, lse = fa.flex_attention(q, k, v, block_mask=block_mask, scale=q.shape[-1] ** -0.5,
                                     return_lse=True)
    return out * torch.sigmoid(lse.float() - sinks.view(1, -1, 1)).to(out.dtype)[..., None]


class Masks:
    """One full and one sliding mask of the length in use, in the form the attention wants."""

    def __init__(self, c, how):
        self.c, self.how, self.made = c, how, {}

    def get(self, t, device):
        if (t, device) not in self.made:
            out = []
            for window in (self.c.window, 0):
                if self.how == "flex":
                    if window:
                        def rule(b, h, i, j, w=window):
                            return (i >= j) & (i - j < w)
                    else:
                        def rule(b, h, i, j):
                            return i >= j
                    out.append(fa.create_block_mask(rule, None, None, t, t, device=str(device)))
                else:
                    out.append(mask_table(t, window, device))
            self.made[t, device] = out
        return self.made[t, device]


def yarn_table(c, t, device):
    """cos and sin [t, head_dim/2] with the published YaRN rule (no rounding of the ramp's ends)."""
    d = c.head_dim
    fast = c.theta ** (-torch.arange(0, d, 2, device=device).float() / d)

    def edge(turns):
        return d * math.log(c.yarn_original / (turns * 2 * math.pi)) / (2 * math.log(c.theta))
    low, high = max(edge(32.0), 0.0), min(edge(1.0), d - 1.0)
    ramp = ((torch.arange(d // 2, device=device).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    turn = torch.arange(t, device=device).float()[:, None] * (
        fast * (1 - ramp) + fast / c.yarn_factor * ramp)
    size = 0.1 * math.log(c.yarn_factor) + 1 if c.yarn_factor > 1 else 1.0
    return turn.cos() * size, turn.sin() * size


def rotate(x, cos, sin):
    """Turns the pairs (i, i + head_dim/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# ---------------------------------------------------------------- the network

class Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden))
        self.eps = c.eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a learned sink per query head."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden)
        self.sinks = nn.Parameter(torch.zeros(c.heads))

    def forward(self, x, cos, sin, mask, how):
        c, (b, t, _) = self.c, x.shape
        q = self.q_proj(x).view(b, t, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = (flex_sinks if how == "flex" else sdpa_sinks)(q, k, v, self.sinks, mask)
        return self.o_proj(o.transpose(1, 2).reshape(b, t, -1))


class Experts(nn.Module):
    """The expert matrices of a layer, and two ways to apply them to routed tokens."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate_up = nn.Parameter(torch.randn(c.experts, 2, c.inner, c.hidden) * c.hidden ** -0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(c.experts, 2, c.inner))
        self.down = nn.Parameter(torch.randn(c.experts, c.hidden, c.inner)
                                 * (c.inner * 2 * c.layers) ** -0.5)
        self.down_bias = nn.Parameter(torch.zeros(c.experts, c.hidden))
        self.rounded = False            # True: forward sees MXFP4 values, gradients pass through

    def matrices(self):
        """(gate_up, down) as the forward pass should see them."""
        if not self.rounded:
            return self.gate_up, self.down
        return tuple(w + (mx_round(w) - w).detach() for w in (self.gate_up, self.down))

    def glu(self, gate, up):
        """The clamped SwiGLU."""
        gate = gate.clamp(max=self.c.limit)
        up = up.clamp(-self.c.limit, self.c.limit)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)

    def dense(self, x, weights, chosen):
        """Every expert on every token, unchosen ones with weight 0: two large products, no gather."""
        c, n = self.c, x.shape[0]
        gate_up, down = self.matrices()
        table = torch.zeros(n, c.experts, device=x.device, dtype=weights.dtype)
        table = table.scatter(1, chosen, weights)
        h = F.linear(x, gate_up.reshape(-1, c.hidden), self.gate_up_bias.reshape(-1))
        h = h.view(n, c.experts, 2, c.inner)
        h = self.glu(h[:, :, 0], h[:, :, 1]) * table[..., None].to(h.dtype)
        out = h.flatten(1) @ down.permute(0, 2, 1).reshape(-1, c.hidden).to(h.dtype)
        return out + table.to(h.dtype) @ self.down_bias.to(h.dtype)

    def grouped(self, x, weights, chosen):
        """Rows sorted by expert, one grouped product a matrix: only the chosen experts run."""
        c, n = self.c, x.shape[0]
        gate_up, down = self.matrices()
        kind = torch.bfloat16
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        expert = flat[order]
        ends = (flat[:, None] == torch.arange(c.experts, device=x.device)).sum(0).cumsum(0).int()
        rows = x[order // c.top_k].to(kind)
        mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
        h = mm(rows, gate_up.flatten(1, 2).to(kind).transpose(-2, -1), offs=ends)
        h = (h + self.gate_up_bias.to(kind)[expert].flatten(1)).view(-1, 2, c.inner)
        h = self.glu(h[:, 0], h[:, 1])
        y = mm(h.contiguous(), down.to(kind).transpose(-2, -1), offs=ends)
        y = (y + self.down_bias.to(kind)[expert]) * weights.reshape(-1)[order, None].to(kind)
        back = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device))
        return y[back].view(n, c.top_k, -1).sum(1)


class Block(nn.Module):
    """One layer: attention and experts, each added to the residual stream. Even layers slide."""

    def __init__(self, c, layer):
        super().__init__()
        self.c = c
        self.sliding = layer % 2 == 0
        self.input_layernorm, self.post_attention_layernorm = Norm(c), Norm(c)
        self.self_attn, self.experts = Attention(c), Experts(c)
        self.router = nn.Linear(c.hidden, c.experts)
        self.drop = 0.0
        self.how = ("sdpa", "dense")

    def forward(self, x, cos, sin, mask):
        c = self.c
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, self.how[0]),
                          self.drop, self.training)
        h = self.post_attention_layernorm(x).view(-1, c.hidden)
        logits = self.router(h).float()
        best, chosen = logits.topk(c.top_k, -1)
        weights = best.softmax(-1)
        y = (self.experts.grouped if self.how[1] == "grouped" else self.experts.dense)(h, weights, chosen)
        # Share of the routed rows times mean probability: 1 when the load is even.
        share = F.one_hot(chosen, c.experts).sum((0, 1)).float() / chosen.numel()
        balance = c.experts * (share * logits.softmax(-1).mean(0)).sum()
        x = x + F.dropout(y.view_as(x).to(x.dtype), self.drop, self.training)
        return x, balance, share


class Model(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocab]."""

    def __init__(self, c):
        super().__init__()
        self.c = c.check()
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = Norm(c)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.masks = Masks(c, "sdpa")
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 if "embed" in name else p.shape[-1] ** -0.5
                if "o_proj" in name:
                    std /= math.sqrt(2 * c.layers)
                nn.init.normal_(p, std=std * (0.5 if "lm_head" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def use(self, attention, experts):
        """Chooses the ways of computing: attention "sdpa" or "flex", experts "dense" or "grouped"."""
        self.masks = Masks(self.c, attention)
        for b in self.layers:
            b.how = (attention, experts)

    def round_experts(self, on):
        """From now on the experts' forward pass sees MXFP4 values, or no longer."""
        for b in self.layers:
            b.experts.rounded = on

    def set_drop(self, p):
        """Dropout on what each half of a layer adds to the residual stream."""
        for b in self.layers:
            b.drop = p

    def hidden(self, ids):
        """(last hidden states [B, T, hidden], load-balancing loss, share of rows per expert [layers, experts])."""
        c, t = self.c, ids.shape[1]
        cos, sin = yarn_table(c, t, ids.device)
        sliding, full = self.masks.get(t, ids.device)
        x, balance, shares = self.embed_tokens(ids), 0.0, []
        for b in self.layers:
            x, extra, share = b(x, cos, sin, sliding if b.sliding else full)
            balance = balance + extra / c.layers
            shares.append(share)
        return self.norm(x), balance, torch.stack(shares)

    def forward(self, ids):
        return self.lm_head(self.hidden(ids)[0])


def pick_kernels(c, device, batch, length):
    """On a GPU: tries FlexAttention and the grouped product against the plain ways, keeps what
    agrees and is faster. Anywhere else: the plain ways."""
    if device != "cuda":
        return "sdpa", "dense"

    def timed(f, *args):
        for _ in range(3):
            f(*args)
        torch.cuda.synchronize()
        t = time.time()
        for _ in range(5):
            f(*args)
        torch.cuda.synchronize()
        return (time.time() - t) / 5

    torch.manual_seed(0)
    small = [torch.randn(batch, c.heads, length, c.head_dim, device=device, dtype=torch.bfloat16,
                         requires_grad=True) for _ in range(3)]
    sinks = torch.randn(c.heads, device=device, requires_grad=True)
    attention = "sdpa"
    try:
        found, spent = {}, {}
        for how, f in (("sdpa", sdpa_sinks), ("flex", torch.compile(flex_sinks))):
            mask = Masks(c, how).get(length, torch.device(device))[0]

            def go(f=f, mask=mask):
                out = f(*small, sinks, mask)
                return out, torch.autograd.grad(out.float().square().mean(), [*small, sinks])
            found[how], spent[how] = go(), timed(go)
        a, b = found["sdpa"], found["flex"]
        err = max(((x - y).float().norm() / x.float().norm()).item()
                  for x, y in zip((a[0], *a[1]), (b[0], *b[1])))
        if err < 0.05 and spent["flex"] < spent["sdpa"]:
            attention = "flex"
        print(f"attention: {spent} s, difference {err:.1e} -> {attention}", flush=True)
    except Exception as e:  # any failure of an optional kernel means: do without it
        print(f"attention: flex does not run here ({type(e).__name__}: {str(e)[:200]}) -> sdpa", flush=True)
    del small
    experts = "dense"
    try:
        ex = Experts(c).to(device)
        x = torch.randn(batch * length, c.hidden, device=device, dtype=torch.bfloat16)
        best, chosen = torch.randn(batch * length, c.experts, device=device).topk(c.top_k, -1)
        weights, found, spent = best.softmax(-1), {}, {}
        for how in ("dense", "grouped"):
            f = torch.compile(getattr(ex, how))

            def go(f=f):
                with torch.autocast(device, torch.bfloat16):
                    out = f(x, weights, chosen)
                return out, torch.autograd.grad(out.float().square().mean(), [ex.gate_up, ex.down])
            found[how], spent[how] = go(), timed(go)
        a, b = found["dense"], found["grouped"]
        err = max(((p - q).float().norm() / p.float().norm()).item()
                  for p, q in zip((a[0], *a[1]), (b[0], *b[1])))
        if err < 0.05 and spent["grouped"] < spent["dense"]:
            experts = "grouped"
        print(f"experts: {spent} s, difference {err:.1e} -> {experts}", flush=True)
    except Exception as e:  # any failure of an optional kernel means: do without it
        print(f"experts: grouped does not run here ({type(e).__name__}: {str(e)[:200]}) -> dense", flush=True)
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return attention, experts


# ---------------------------------------------------------------- weights on disk

def save_weights(model, folder, limit=15 << 20):
    """bf16 weights in files of at most `limit` bytes, and the Config as small.json."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shard, size, n = {}, 0, 0
    for name, p in model.state_dict().items():
        p = p.detach().to("cpu", torch.bfloat16).contiguous()
        if shard and size + p.nbytes > limit:
            save_file(shard, folder / f"weights-{n}.safetensors")
            shard, size, n = {}, 0, n + 1
        shard[name] = p
        size += p.nbytes
    save_file(shard, folder / f"weights-{n}.safetensors")
    (folder / "small.json").write_text(json.dumps(asdict(model.c)) + "\n")


def load_weights(folder):
    """The Model that save_weights wrote, in float32."""
    folder = pathlib.Path(folder)
    model = Model(Config(**json.loads((folder / "small.json").read_text())))
    state = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        state.update(load_file(path))
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model
