"""The checks before `copy_`, and the `copy_`."""

from __future__ import annotations

import pytest
import torch

from recorder.errors import GraftRefused, TransformError
from replayer.graft import check_replacement, check_target, overlaps_itself, overwrite


@pytest.mark.parametrize(
    ("make", "overlapping"),
    [
        (lambda t: t, False),
        (lambda t: t.t(), False),
        (lambda t: t[::2, 1:], False),
        (lambda t: t[:1].expand(5, 6), True),
        (lambda t: t.view(-1).as_strided((5, 4), (2, 1)), True),
        (lambda t: t.view(-1).as_strided((2, 3), (3, 2)), False),  # interleaved, never colliding
        (lambda t: t.view(-1).as_strided((3, 4), (3, 2)), True),
        (lambda t: t[0, 0], False),
        (lambda t: t[:, :0], False),
        (lambda t: t[:1].expand(1, 6), False),
    ],
)
def test_overlapping_memory_is_seen_exactly(make, overlapping):
    t = make(torch.zeros(4, 6))
    assert overlaps_itself(t) is overlapping
    if overlapping:
        with pytest.raises(GraftRefused, match="overlap in memory"):
            check_target(t)


@pytest.mark.parametrize(
    ("new", "target", "error", "message"),
    [
        (None, torch.zeros(2), TransformError, "returned None, expected a tensor"),
        ([1.0], torch.zeros(2), TransformError, "returned a list"),
        (torch.zeros(1), torch.zeros(2), GraftRefused, r"replacement has \[1\], the target \[2\]"),
        (torch.tensor(1.0), torch.zeros(2), GraftRefused, "nothing is broadcast"),
        (torch.zeros(2, device="meta"), torch.zeros(2), TransformError, "on meta, the target is"),
        (torch.eye(2).to_sparse(), torch.zeros(2, 2), TransformError, "its layout is sparse_coo"),
        (torch.ones(2), torch.zeros(2, dtype=torch.int64), GraftRefused, "would lose values"),
        (torch.ones(2), torch.zeros(2, dtype=torch.bool), GraftRefused, "would lose values"),
        (torch.tensor([300]), torch.zeros(1, dtype=torch.uint8), GraftRefused, "int64 to uint8"),
        (torch.tensor([-1]), torch.zeros(1, dtype=torch.uint64), GraftRefused, "would lose"),
        (torch.tensor([2]), torch.zeros(1, dtype=torch.bool), GraftRefused, "would lose values"),
        (torch.tensor([2**53 + 1]), torch.zeros(1).double(), GraftRefused, "would lose values"),
        (torch.ones(1, dtype=torch.complex64), torch.zeros(1), GraftRefused, "would lose values"),
        (torch.ones(1).byte(), torch.zeros(1).to(torch.float8_e5m2), GraftRefused, "other's bytes"),
        (torch.zeros(1).to(torch.float8_e5m2), torch.ones(1).char(), GraftRefused, "other's bytes"),
    ],
)
def test_what_is_not_faithful_is_refused_with_a_reason(new, target, error, message):
    with pytest.raises(error, match=message):
        check_replacement(new, target)


@pytest.mark.parametrize(
    ("new", "dtype", "note"),
    [
        (torch.tensor([1.5]), torch.float32, ""),
        (torch.tensor([1.5]), torch.bfloat16, "cast from float32 to bfloat16"),
        (torch.tensor([1.5]).bfloat16(), torch.float64, "cast from bfloat16 to float64"),
        (torch.tensor([1.5]), torch.float8_e4m3fn, "cast from float32 to float8_e4m3fn"),
        (torch.tensor([7]), torch.int8, "cast from int64 to int8"),
        (torch.tensor([7]), torch.float32, "cast from int64 to float32"),
        (torch.tensor([True]), torch.int32, "cast from bool to int32"),
    ],
)
def test_a_cast_that_keeps_the_values_or_rounds_floats_is_done_and_noted(new, dtype, note):
    made, said = check_replacement(new, torch.zeros(1, dtype=dtype))
    assert made.dtype == dtype and said == note
    assert made.double().item() == new.double().item()


def test_backward_goes_on_with_the_new_values_of_a_saved_activation():
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    h = w * 5
    out = (h * h).sum()  # saves h
    overwrite(h, torch.tensor([1.0, 10.0]))
    out.backward()
    assert torch.equal(w.grad, torch.tensor([2 * 1 * 5.0, 2 * 10 * 5.0]))


def test_leaves_views_and_inference_tensors_are_overwritten_where_they_stand():
    w = torch.nn.Parameter(torch.zeros(3))
    overwrite(w, torch.ones(3))
    assert w.sum() == 3 and w.requires_grad and w.grad_fn is None
    base = torch.zeros(2, 4)
    overwrite(base.t()[::2], torch.ones(2, 2))
    assert base.tolist() == [[1, 0, 1, 0]] * 2
    with torch.inference_mode():
        t = torch.zeros(2)
    overwrite(t, torch.ones(2))
    assert t.sum() == 2 and t.is_inference()
    with torch.inference_mode():
        inner = torch.ones(3)
        overwrite(w, inner * 2)
    assert w.sum() == 6


def test_a_replacement_that_shares_the_target_s_memory_is_copied_first():
    t = torch.arange(6.0)
    overwrite(t[1:], t[:-1])
    assert t.tolist() == [0, 0, 1, 2, 3, 4]
