"""Transforms that were written for sglang's dumper, run as they are; with the real dumper."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from dumping import imported, needs_sglang

from replayer.transforms import GraftInput, Transform

SUM = """
    import torch
    from sglang.srt.debug_utils.dumper import GraftTransformInput

    seen = []

    def one(graft_input: GraftTransformInput) -> torch.Tensor:
        seen.append(graft_input)
        assert graft_input.tags["name"] == "h"
        scales = [(extras or {"scale": 1})["scale"] for extras in graft_input.received_extras_list]
        parts = [part * scale for part, scale in zip(graft_input.received_list, scales)]
        return torch.cat(parts).to(graft_input.target.dtype)

    def two(received_list, target):
        return torch.cat(received_list).to(target.dtype)
"""


class GraftTransformInput: ...


def annotated(g: GraftTransformInput): ...
def quoted(g: sglang.srt.debug_utils.dumper.GraftTransformInput): ...  # noqa: F821
def named(graft_input): ...
def plain(g): ...
def of_graft(g: GraftInput): ...
def two(received_list, target): ...


@pytest.mark.parametrize(
    ("function", "is_theirs"),
    [
        (annotated, True),
        (quoted, True),
        (named, True),
        (plain, False),
        (of_graft, False),
        (two, False),
    ],
)
def test_one_written_for_the_dumper_is_known_by_its_signature(function, is_theirs):
    assert Transform(function)._is_of_dumper is is_theirs


@pytest.fixture
def module(tmp_path, monkeypatch):
    yield from imported(tmp_path / "lib", monkeypatch)


@pytest.fixture
def transforms(module, tmp_path, monkeypatch):
    (tmp_path / "lib" / "mytransforms.py").write_text(inspect.cleandoc(SUM) + "\n")
    monkeypatch.delitem(sys.modules, "mytransforms", raising=False)
    yield "mytransforms"
    sys.modules.pop("mytransforms", None)


@pytest.fixture
def recorded(module, record):
    def job(rank):
        extras = {"scale": 2} if rank == 1 else None
        module.dumper.dump("h", torch.full((2,), rank + 1.0), grafter_extras=extras, layer_id=4)

    return record(job, world_size=2)


@needs_sglang
def test_both_signatures_get_what_the_senders_dumped(module, recorded, transforms, replay):
    for name, values in (("one", [1.0, 1.0, 4.0, 4.0]), ("two", [1.0, 1.0, 2.0, 2.0])):
        h = torch.zeros(4)
        (session,) = replay(
            lambda rank, h=h: module.dumper.dump("h", h, layer_id=4),
            transform=f"{transforms}.{name}",
        )
        assert session.problems() == [] and h.tolist() == values


@needs_sglang
def test_what_it_gets_has_all_that_the_dumper_s_has(module, recorded, transforms, replay):
    replay(
        lambda rank: module.dumper.dump("h", torch.zeros(4), layer_id=4),
        transform=f"{transforms}.one",
    )
    (seen,) = sys.modules[transforms].seen
    for field in module.GraftTransformInput.__dataclass_fields__:
        assert hasattr(seen, field) or field == "target"  # which is gone once it has returned
    assert seen.tags == {"name": "h", "layer_id": 4, "recompute_status": "disabled"}
    assert seen.received_extras_list == [None, {"scale": 2}]


@needs_sglang
def test_one_that_raises_leaves_the_tensor_as_it_was(module, recorded, replay):
    def fails(graft_input):
        raise KeyError("no such shard")

    h = torch.zeros(4)
    (session,) = replay(lambda rank: module.dumper.dump("h", h, layer_id=4), transform=fails)
    assert h.tolist() == [0.0] * 4 and "KeyError" in session.problems()[0]
