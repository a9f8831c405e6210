"""A small network that is trained with taps, on ranks that share the batch or the columns.

Weights are tapped at the start of each step, activations with their gradients, gradients of the
parameters after they are reduced and again after they are clipped. The loss is a mean over all
tokens of all ranks. A fault is a name and a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, gelu

from recorder import declare_mesh, step, tap


@dataclass(frozen=True)
class Options:
    """How one side trains; `axis` says what its ranks share: `dp` or `tp`."""

    axis: str = "dp"
    ranks: int = 1
    dtype: str = "float32"
    layers: int = 4
    width: int = 48
    batch: int = 8
    tokens: int = 12
    steps: int = 3
    optimiser: str = "sgd"
    clip: float = 0.5
    order: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where."""

    name: str
    layer: int = 0


class Off(torch.autograd.Function):
    """The identity, whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        """Return x."""
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient, off by the factor."""
        return grad * ctx.factor, None


class AllReduce(torch.autograd.Function):
    """A sum over ranks, whose gradient is the same on each."""

    @staticmethod
    def forward(ctx, x):
        """Return the sum."""
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient."""
        return grad


class Copied(torch.autograd.Function):
    """The identity, whose gradient is a sum over ranks."""

    @staticmethod
    def forward(ctx, x):
        """Return x."""
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        """Return the sum."""
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Trainer:
    """One rank of a training run."""

    def __init__(self, options: Options, rank: int = 0, faults: tuple[Fault, ...] = ()):
        self.options, self.rank, self.faults = options, rank, faults
        o = options
        random = torch.Generator().manual_seed(3000 + o.seed)

        def draw(*shape, cut=None):
            values = torch.randn(*shape, generator=random) / shape[-2] ** 0.5
            if cut is not None and o.axis == "tp":
                values = values.chunk(o.ranks, cut)[rank]
            return values.contiguous().requires_grad_()

        self.cut = {"up": "[tp]" if o.axis == "tp" else "", "down": ""}
        self.weights = {"embedding": draw(61, o.width)}
        for layer in range(o.layers):
            self.weights["up", layer] = draw(o.width, 2 * o.width, cut=1)
            self.weights["down", layer] = draw(2 * o.width, o.width, cut=0)
        self.weights["head"] = draw(o.width, 61)
        self.stale = {key: w.detach().clone() for key, w in self.weights.items()}
        self.momenta = {key: torch.zeros_like(w) for key, w in self.weights.items()}

    def has(self, name, layer=None):
        """Whether a fault was planted."""
        return any(f.name == name and layer in (None, f.layer) for f in self.faults)

    def about(self, key):
        """Return the name, dims and tags of a parameter."""
        if isinstance(key, str):
            return key, "v w" if key == "embedding" else "w v", {}
        name, layer = key
        tp = "[tp]" if self.options.axis == "tp" else ""
        return name, f"w f{tp}" if name == "up" else f"f{tp} w", {"layer": layer}

    def each(self, title, values):
        """Tap a tensor of each parameter."""
        for key, value in values.items():
            name, dims, tags = self.about(key)
            tap(f"{title}_{name}", value, dims=dims, **tags)

    def forward(self, tokens):
        """Tokens [b, s] to logits."""
        o = self.options
        dtype = getattr(torch, o.dtype)
        b = "b[dp]" if o.axis == "dp" else "b"
        tp = "[tp]" if o.axis == "tp" else ""
        x = self.weights["embedding"].to(dtype)[tokens]
        whole = f"{b} s w # grad: {b} s w"
        x = tap("embed", x, dims=whole, grad=True)
        for layer in range(o.layers):
            up, down = (self.weights[name, layer] for name in ("up", "down"))
            if self.has("stale", layer):
                up = self.stale["up", layer] + (up - up.detach())
            y = x / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-5).to(dtype)
            y = tap("norm", y, dims=whole, grad=True, layer=layer)
            if o.axis == "tp" and o.ranks > 1:
                y = Copied.apply(y)
            act = gelu(y @ up.to(dtype))
            if self.has("backward", layer):
                act = Off.apply(act, 1.1)
            act = tap("act", act, dims=f"{b} s f{tp}", grad=True, layer=layer)
            out = act @ down.to(dtype)
            if o.axis == "tp" and o.ranks > 1:
                out = AllReduce.apply(out)
            x = x + tap("out", out, dims=whole, grad=True, layer=layer)
        logits = x @ self.weights["head"].to(dtype)
        return tap("logits", logits, dims=f"{b} s v # grad: {b} s v", grad=True)

    def reduced(self, key, grad):
        """Return the sum of a gradient over ranks, as far as no fault is in the way."""
        o = self.options
        if o.axis != "dp" or o.ranks == 1:
            return grad
        layer = key[1] if isinstance(key, tuple) and key[0] == "down" else -1
        if self.has("unreduced", layer):
            return grad
        grad = grad.clone()
        dist.all_reduce(grad)
        if self.has("averaged", layer):
            return grad / o.ranks
        if self.has("twice", layer):
            dist.all_reduce(grad)
        return grad

    def norm(self, grads):
        """Return the norm of all gradients."""
        total = torch.zeros(())
        for key, grad in grads.items():
            square = grad.square().sum()
            is_cut = self.options.axis == "tp" and isinstance(key, tuple)
            if is_cut and self.options.ranks > 1 and not self.has("own_norm"):
                dist.all_reduce(square)
            total = total + square
        return total.sqrt()

    def run(self):
        """Train for some steps."""
        o = self.options
        declare_mesh(**{o.axis: (self.rank, o.ranks)})
        random = torch.Generator().manual_seed(4000 + o.seed)
        for _step in range(o.steps):
            tokens = torch.randint(61, (o.batch, o.tokens + 1), generator=random)
            if o.axis == "dp":
                tokens = tokens.chunk(o.ranks)[self.rank]
            self.each("weight", self.weights)
            logits = self.forward(tokens[:, :-1])
            labels = tokens[:, :-1] if self.has("labels") else tokens[:, 1:]
            logits = logits.flatten(0, 1).float()
            parts = [
                cross_entropy(a, b, reduction="sum")
                for a, b in zip(
                    logits.chunk(o.order), labels.reshape(-1).chunk(o.order), strict=True
                )
            ]
            count = o.batch * o.tokens * (2 if self.has("count") else 1)
            loss = sum(parts) / count
            loss.backward()
            with torch.no_grad():
                self.update()
            step()

    def update(self):
        """Reduce, clip and apply the gradients."""
        o = self.options
        grads = {key: self.reduced(key, w.grad) for key, w in self.weights.items()}
        self.each("grad", grads)
        norm = tap("norm_of_grads", self.norm(grads).reshape(1), dims="n")
        factor = (o.clip / norm).clamp(max=1.0)
        grads = {key: grad * factor for key, grad in grads.items()}
        self.each("clipped", grads)
        for key, weight in self.weights.items():
            self.stale[key] = weight.detach().clone()
            rate = 1.0
            weight.grad = None
            if isinstance(key, tuple):
                name, layer = key
                if name == "up" and self.has("skipped", layer) and self.rank == 1:
                    continue
                if name == "down" and self.has("decay", layer):
                    weight.mul_(0.98)
                if name == "down" and self.has("rate", layer):
                    rate = 2.0
            if o.optimiser == "momentum":
                self.momenta[key].mul_(0.9).add_(grads[key])
                weight.sub_(rate * self.momenta[key])
            else:
                weight.sub_(rate * grads[key])
