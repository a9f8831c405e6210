"""Checkpoints of every known kind, and a job of micro-batches through checkpointed layers."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from recorder import step, tap


class CheckpointFunction(torch.autograd.Function):
    """As Megatron's and DeepSpeed's: a node, whose backward runs the forward again."""

    @staticmethod
    def forward(ctx, run_function, distribute_saved_activations, *args):
        ctx.run_function = run_function
        with torch.no_grad():
            outputs = run_function(*args)
        ctx.save_for_backward(*args)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.run_function(*inputs)
        torch.autograd.backward((outputs,), grads)
        return (None, None, *(t.grad for t in inputs))


def as_megatron(function, *args):
    return CheckpointFunction.apply(function, False, *args)


class CheckpointWithoutOutputFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run_function, owner, *args):
        with torch.no_grad():
            outputs = run_function(*args)
        ctx.save_for_backward(*args)
        owner.ctx = ctx
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        torch.autograd.backward((ctx.outputs,), grads)
        return (None, None, *(t.grad for t in ctx.inputs))


class CheckpointWithoutOutput:
    """As Megatron's, which is repeated by a hook on what follows."""

    def checkpoint(self, run_function, *args):
        self.run_function = run_function
        return CheckpointWithoutOutputFunction.apply(run_function, self, *args)

    def _recompute(self, _):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in self.ctx.saved_tensors]
        with torch.enable_grad():
            self.ctx.outputs = self.run_function(*inputs)
        self.ctx.inputs = inputs


def by_an_output_hook(function, *args):
    owner = CheckpointWithoutOutput()
    follows = owner.checkpoint(function, *args) * 1
    follows.register_hook(owner._recompute)
    return follows


def as_deepspeed_without_a_node(function, *args):
    """Nothing tells which forward it repeats."""
    count, again = itertools.count(), []

    def checkpoint_unpack(i):
        if not again:
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda x: again.append(x.detach()) or x, lambda x: x
            )
            with torch.enable_grad(), hooks:
                function(*args)
        return again[i]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: next(count), checkpoint_unpack):
        return function(*args)


def as_transformer_engine(function, *args):
    """A frame and hooks, as torch has, in a file of its own."""

    class _CheckpointFrame:
        def __init__(self, recompute_fn):
            self.recompute_fn = recompute_fn
            self.recomputed = []

    frame, count = _CheckpointFrame(function), itertools.count()

    def pack_hook(x):
        frame.recomputed.clear()
        return next(count)

    def unpack_hook(i):
        if not frame.recomputed:
            kept = []

            def keep(x):
                kept.append(x.detach())
                return x

            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with torch.enable_grad(), hooks:
                frame.recompute_fn(*args)
            frame.recomputed = kept
        return frame.recomputed[i]

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, unpack_hook):
        return function(*args)


def with_hooks_between(function, *args):
    """Saved tensors of the job's own hide the checkpoint's."""

    def inner(*args):
        with torch.autograd.graph.save_on_cpu():
            y = function(*args)
        return y * torch.ones_like(y)  # saved by the checkpoint

    return checkpoint(inner, *args, use_reentrant=False)


def selective(function, *args):
    """What is saved is not computed again; its tap fires all the same."""
    if not hasattr(checkpointing, "create_selective_checkpoint_contexts"):
        pytest.skip("torch has no selective checkpoints")

    def policy(context, operator, *args, **options):
        is_saved = operator == torch.ops.aten.mul.Tensor
        kinds = checkpointing.CheckpointPolicy
        return kinds.MUST_SAVE if is_saved else kinds.PREFER_RECOMPUTE

    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def by_module(function, *args):
    class Layer(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrapper.checkpoint_wrapper(Layer())(*args)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def frames(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def decorated(function, *args):
    """As from torch 2.14 on."""
    return checkpoint(use_reentrant=False)(function)(*args)


def sequential(function, *args):
    return checkpoint_sequential([function], 1, *args, use_reentrant=False)


def plain(function, *args):
    return function(*args)


HAS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # torch 2.7
HAS_DECORATOR = inspect.signature(checkpoint).parameters["function"].default is None
KINDS = {
    "frames": frames,
    "reentrant": reentrant,
    "megatron": as_megatron,
    "output hook": by_an_output_hook,
    **({"transformer engine": as_transformer_engine} if HAS_HOOKS else {}),
    "offloading": with_hooks_between,
    "wrapper": by_module,
    "selective": selective,
    **({"decorated": decorated} if HAS_DECORATOR else {}),
}
ORDERS = {"in turn": None, "fifo": (0, 1, 2), "lifo": (2, 1, 0), "any": (1, 2, 0)}


class Job:
    """Three micro-batches through two checkpointed layers, each of which taps `h` twice.

    Attributes:
        seen: (micro-batch, layer, tap) and the value there after the tap, in order.
    """

    def __init__(self, kind, order=None, shift=0.0, inner=plain, steps=1, step_between=False):
        self.kind, self.order, self.inner = kind, order, inner
        self.shift, self.steps, self.step_between = shift, steps, step_between
        self.seen = []

    def __call__(self, rank):
        for number in range(self.steps):
            losses = []
            for batch in range(3):
                x = torch.full((2,), 10.0 * number + batch + 1 + self.shift, requires_grad=True)
                for layer in range(2):
                    x = self.kind(lambda x, b=batch, n=layer: self.layer(b, n, x), x)
                losses.append(x.sum())
                if self.order is None:
                    losses.pop().backward()
            if self.step_between:
                step()
            for batch in self.order or ():
                losses[batch].backward()
            if not self.step_between:
                step()

    def layer(self, batch, layer, x):
        def part(x, at):
            h = tap("h", x * (2 + at + layer))
            self.seen.append(((batch, layer, at), h[0].item()))
            return h * h.sigmoid()

        x = self.inner(lambda x: part(x, 0), x)
        return self.inner(lambda x: part(x, 1), x) / 100


def check(job, base, times):
    """Each tap of the job has the base's value, as often as it fired."""
    want = dict(base.seen)
    assert len(want) == len(base.seen)
    assert all(want[key] == value for key, value in job.seen)
    assert len(job.seen) == times * len(want)
