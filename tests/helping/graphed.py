"""A CUDA graph on the CPU: what is run while it is captured is run again as it is replayed."""

from __future__ import annotations

import pytest
import torch
from torch._higher_order_ops.effects import with_effects
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recorder.taps import graphs, operators

_RUN = {
    getattr(torch.ops.tensorgraft, schema.partition("(")[0]).default: run
    for schema, run, _ in operators._OPERATORS
}


class _Tape(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    @classmethod
    def is_infra_mode(cls):
        return True  # Dynamo runs what it compiled under no other

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is with_effects:
            token, func, *args = args
            made = self.__torch_dispatch__(func, types, args, kwargs)
            return (token, *made) if isinstance(made, tuple) else (token, made)
        if func in _RUN:  # what it does is captured, and not that it is called
            with self:
                return _RUN[func](*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if "empty" not in func.__name__:  # memory is there once, and nothing fills it
            self.graph.calls.append((func, args, kwargs or {}, made))
        return made


class FakeGraph:
    """As torch.cuda.CUDAGraph."""

    capturing = 0

    def __init__(self):
        self.calls = []

    def capture_begin(self, pool=None):
        self.calls = []
        FakeGraph.capturing += 1
        self._tape = _Tape(self)
        self._tape.__enter__()

    def capture_end(self):
        self._tape.__exit__(None, None, None)
        FakeGraph.capturing -= 1

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                again = func(*args, **kwargs)
                for one, other in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    is_tensor = isinstance(one, torch.Tensor)
                    if is_tensor and one.data_ptr() != other.data_ptr():
                        one.detach().copy_(other)

    def reset(self):
        self.calls = []


class FakeBackend:
    """As `recorder.taps.graphs.Cuda`, of such graphs."""

    kind = FakeGraph
    device = "cpu"

    def __init__(self):
        self.waits = 0
        FakeGraph.capturing = 0

    def is_there(self):
        return True

    def is_capturing(self, tensor):
        return FakeGraph.capturing > 0

    def mark(self, device):
        return self

    def wait(self, device, mark):
        self.waits += 1


class RealBackend(graphs.Cuda):
    """`recorder.taps.graphs.Cuda`, which counts."""

    device = "cuda"

    def __init__(self):
        self.waits = 0

    def wait(self, device, mark):
        self.waits += 1
        super().wait(device, mark)


MACHINES = [
    FakeBackend,
    pytest.param(
        RealBackend,
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
]


def captured_by(backend, function):
    """Return a graph of what a function does, and what it returned as that was captured."""
    graph = backend.kind()
    if isinstance(backend, RealBackend):
        with torch.cuda.graph(graph):
            return graph, function()
    graph.capture_begin()
    try:
        return graph, function()
    finally:  # as torch.cuda.graph ends it
        graph.capture_end()
