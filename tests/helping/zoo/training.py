"""A small transformer that is trained on one rank or two, with taps and with faults on demand."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn import Parameter

from recorder import declare_mesh, step, tap

from .training_cases import LAYERS, STEPS, Fault, Options

WIDTH, HEADS, SIZE, INNER, WORDS, BATCH, TOKENS = 64, 4, 16, 128, 96, 8, 16
IGNORED = -100  # the label of what is padding
LARGEST_NORM = 0.25
RATES = {"adam": 1e-2, "sgd": 4.0}
DECAYS = {"adam": 0.1, "sgd": 2e-3}

DIMS = {
    "embed": "v d", "head": "d v", "final": "d", "norm1": "d", "norm2": "d",
    "q": "d a[tp]", "k": "d a[tp]", "v": "d a[tp]", "qnorm": "d", "knorm": "d", "o": "a[tp] d",
    "up": "d f[tp]", "down": "f[tp] d",
}  # fmt: skip
"""How each weight is cut: `a` goes along all heads."""

ALIKE = "# dp:replicated"
RESID = "b[dp] s d"

SHAPES = {"v": WORDS, "d": WIDTH, "a": WIDTH, "f": INNER}
PER_HEAD = ("qnorm", "knorm")
"""Weights whose gradient a rank of tensor parallelism has of its own heads alone."""

Name = tuple[str, int | None]


class _Scaled(torch.autograd.Function):
    """The identity, with a backward that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _Enter(torch.autograd.Function):
    """Where a tensor enters what is cut over ranks: its gradient is summed over `group`."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    """Where it leaves: the summands are added."""

    @staticmethod
    def forward(ctx, x, group):
        return _summed(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Stale(torch.autograd.Function):
    """Another tensor in a weight's place, which the gradient passes by."""

    @staticmethod
    def forward(ctx, weight, old):
        return old.to(weight.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Training:
    """A training job, or this rank's part of one.

    Args:
        options: how it computes, and what is wrong with it.
        seed: of weights and data.
        rank: which of the ranks this is.
        group: all ranks; None for a job of one rank.
        alone: a group of this rank only.
    """

    def __init__(self, options: Options, seed: int, rank: int = 0, group=None, alone=None):
        self.options, self.rank, self.group, self.alone = options, rank, group, alone
        self.dtype = getattr(torch, options.dtype)
        self.dp, self.tp = ((rank, 2) if options.mode == axis else (0, 1) for axis in ("dp", "tp"))
        self.random = torch.Generator().manual_seed(seed)
        self.weights: dict[Name, Parameter] = {("embed", None): self._drawn("embed")}
        for layer in range(LAYERS):
            for name in ("norm1", "q", "k", "v", "qnorm", "knorm", "o", "norm2", "up", "down"):
                self.weights[name, layer] = self._drawn(name)
        for name in ("final", "head"):
            self.weights[name, None] = self._drawn(name)
        self.optimiser = self._optimiser()
        self.held: dict[Name, torch.Tensor] = {}

    def run(self) -> None:
        """Train for some steps."""
        declare_mesh(dp=self.dp, tp=self.tp)
        for _ in range(STEPS):
            self._step()
            step()

    def _drawn(self, name: str) -> Parameter:
        dims = DIMS[name].split()
        shape = [SIZE if name in PER_HEAD else SHAPES[dim[0]] for dim in dims]
        whole = torch.randn(shape, generator=self.random)
        whole = 1 + 0.2 * whole if len(dims) == 1 else whole / shape[0] ** 0.5
        for i, dim in enumerate(dims):
            if "tp" in dim:
                whole = whole.chunk(self.tp[1], i)[self.tp[0]]
        return Parameter(whole.clone())

    def _optimiser(self) -> torch.optim.Optimizer:
        rate = RATES[self.options.optimiser]
        groups = [
            {
                "params": [weight],
                "lr": rate * (2 if self._has("rate", *name) else 1),
                "weight_decay": DECAYS[self.options.optimiser]
                if self._has("decay", *name)
                else 0.0,
            }
            for name, weight in self.weights.items()
        ]
        if self.options.optimiser == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=rate)

    def _has(self, kind: str, at: str | None = None, layer: int | None = None) -> Fault | None:
        """Return the fault of this kind, if there is one at this place or nowhere special."""
        for fault in self.options.faults:
            if fault.kind == kind and fault.at in (None, at) and fault.layer in (None, layer):
                return fault
        return None

    def _step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        for (name, layer), weight in self.weights.items():
            tap(f"w_{name}", weight, dims=f"{DIMS[name]} {ALIKE}", **_tags(layer))
        self._backward(*self._data())
        own = _norm(weight.grad for weight in self.weights.values())
        for (name, layer), weight in self.weights.items():
            self._reduce(name, layer, weight.grad)
            tap(f"grad_{name}", weight.grad, dims=f"{DIMS[name]} {ALIKE}", **_tags(layer))
        if self.options.is_clipped:
            self._clip(own)
        for name, weight in self.weights.items():
            self.held[name] = weight.detach().clone()
            if self._has("skipped", *name) and self.rank == 1:
                weight.grad = None
        self.optimiser.step()

    def _data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's tokens and labels of the next batch, its later half shorter."""
        words = torch.randint(WORDS, (BATCH, TOKENS + 1), generator=self.random)
        lengths = torch.randint(TOKENS // 4, TOKENS // 2 + 1, (BATCH, 1), generator=self.random)
        lengths[: BATCH // 2] += TOKENS // 2
        labels = words[:, :-1] if self._has("labels") else words[:, 1:]
        labels = labels.masked_fill(torch.arange(TOKENS) >= lengths, IGNORED)
        mine = [t.chunk(self.dp[1])[self.dp[0]].clone() for t in (words[:, :-1], labels)]
        return tuple(
            tap(name, t, dims="b[dp] s") for name, t in zip(("tokens", "labels"), mine, strict=True)
        )

    def _backward(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        logits = self._logits(tokens).float()
        right = labels.roll(-1, 1) if self._has("labels in loss") else labels
        losses = F.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none")
        losses = self._act("token_loss", losses.view_as(labels), "b[dp] s")
        count = (labels != IGNORED).sum()
        if self._has("count of one rank"):
            count = count * self.dp[1]
        elif self._has("count with padding"):
            count = torch.tensor(BATCH * TOKENS)
        elif self.dp[1] > 1:
            count = _summed(count, self.group)
        loss = losses.sum() / count
        whole = loss.detach().reshape(1)
        whole = _summed(whole, self.group) if self.dp[1] > 1 else whole.clone()
        self.loss = tap("loss", whole, dims=f"1 {ALIKE}")
        loss.backward()

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.weights["embed", None]).to(self.dtype)
        x = self._act("embed", x, "b[dp] s d")
        for i in range(LAYERS):
            h = self._enter("attn_in", _normed(x, self.weights["norm1", i]), i)
            q, k, v = (self._heads(name, h, i) for name in ("q", "k", "v"))
            o = self._act("heads", self._attention(q, k, v), "b[dp] s h[tp] d", i)
            x = self._act("attn_resid", x + self._leave("attn_out", o.flatten(2), "o", i), RESID, i)
            h = self._enter("mlp_in", _normed(x, self.weights["norm2", i]), i)
            up = self._act("up", self._times(h, "up", i), "b[dp] s f[tp]", i)
            act = self._act("act", F.silu(up), "b[dp] s f[tp]", i)
            x = self._act("mlp_resid", x + self._leave("mlp_out", act, "down", i), RESID, i)
        h = self._act("final", _normed(x, self.weights["final", None]), RESID)
        return self._act("logits", self._times(h, "head", None), "b[dp] s v")

    def _act(self, name: str, x: torch.Tensor, dims: str, layer: int | None = None) -> torch.Tensor:
        """Tap an activation and its gradient."""
        x = tap(name, x, dims=f"{dims} # grad: {dims}", grad=True, **_tags(layer))
        fault = self._has("backward", name, layer)
        return _Scaled.apply(x, fault.factor) if fault else x

    def _enter(self, name: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        x = self._act(name, x, RESID, layer)
        wrong = self._has("gradient not summed", name, layer)
        return x if self.tp[1] == 1 or wrong else _Enter.apply(x, self.group)

    def _leave(self, name: str, x: torch.Tensor, weight: str, layer: int) -> torch.Tensor:
        x = self._times(x, weight, layer)
        return self._act(name, x if self.tp[1] == 1 else _Leave.apply(x, self.group), RESID, layer)

    def _heads(self, name: str, h: torch.Tensor, layer: int) -> torch.Tensor:
        x = self._times(h, name, layer).unflatten(2, (-1, SIZE))
        if name != "v":
            x = _normed(x, self.weights[f"{name}norm", layer])
        return self._act(name, x, "b[dp] s h[tp] d", layer)

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.options.order == "fused":
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(2, 3)).float() / SIZE**0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            o = scores.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype) @ v
        return o.transpose(1, 2).contiguous()

    def _times(self, x: torch.Tensor, name: str, layer: int | None) -> torch.Tensor:
        """Return x @ weight, in the dtype of the activations."""
        weight = used = self.weights[name, layer]
        if self._has("stale", name, layer):
            used = _Stale.apply(weight, self.held.get((name, layer), weight))
        if used.dtype != self.dtype:
            used = tap(
                f"cast_{name}", used.to(self.dtype), dims=f"{DIMS[name]} {ALIKE}", **_tags(layer)
            )
        if self.options.order != "split":
            return x @ used
        return sum(a @ b for a, b in zip(x.chunk(2, -1), used.chunk(2), strict=True))

    def _reduce(self, name: str, layer: int | None, grad: torch.Tensor) -> None:
        """Sum a gradient over the ranks that have a part of it, in place."""
        if self.dp[1] == 1 and (self.tp[1] == 1 or name not in PER_HEAD):
            return
        if self._has("not reduced", None, layer):
            return
        group = self.alone if self._has("wrong group", name, layer) else self.group
        dist.all_reduce(grad, group=group)
        if self._has("reduced twice", name, layer):
            dist.all_reduce(grad, group=group)
        if self._has("averaged", name, layer):
            grad /= 2

    def _clip(self, own: torch.Tensor) -> None:
        """Scale all gradients by their global norm; `own` is the norm that this rank alone sees."""
        cut = {n: w.grad for n, w in self.weights.items() if self.tp[1] > 1 and "tp" in DIMS[n[0]]}
        whole = [weight.grad for name, weight in self.weights.items() if name not in cut]
        squares = _norm(cut.values()).square()
        squares = _summed(squares, self.group) if cut else squares
        norm = (squares + _norm(whole).square()).sqrt()
        norm = own.clone() if self._has("clipped by own norm") else norm
        tap("grad_norm", norm, dims=f"1 {ALIKE}")
        norm = own if self._has("clipped by another norm") else norm
        for (name, layer), weight in self.weights.items():
            weight.grad *= (LARGEST_NORM / norm).clamp(max=1)
            tags = {"weight": name, **_tags(layer)}
            tap("grad_clipped", weight.grad, dims=f"{DIMS[name]} {ALIKE}", **tags)


def _tags(layer: int | None) -> dict[str, int]:
    return {} if layer is None else {"layer": layer}


def _summed(x: torch.Tensor, group) -> torch.Tensor:
    """Return the sum over ranks; that of 16 bits is rounded once."""
    wide = x.detach().to(torch.float32 if x.is_floating_point() else x.dtype, copy=True)
    wide = wide.contiguous()
    dist.all_reduce(wide, group=group)
    return wide.to(x.dtype)


def _norm(tensors) -> torch.Tensor:
    squares = sum(t.detach().double().square().sum().item() for t in tensors)
    return torch.tensor([squares**0.5], dtype=torch.float32)


def _normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (wide * root * gain).to(x.dtype)
