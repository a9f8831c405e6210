"""What a cast does to range: counted in the note, refused beyond a share."""

from __future__ import annotations

import math

import pytest
import torch
from tapping import outcomes

from recorder import tap
from recorder.errors import GraftRefused, TransformError
from replayer.casts import MOST_LOST, cast
from replayer.graft import check_replacement, overwrite

FP8 = torch.float8_e4m3fn
BEYOND_FP8 = str(torch.tensor(1000.0).to(FP8).float().item())  # torch 2.6 makes it NaN


def many(*odd, dtype=torch.float32):
    """A thousand ones, and some values."""
    return torch.cat([torch.ones(1000, dtype=dtype), torch.tensor(odd, dtype=dtype)])


@pytest.mark.parametrize(
    ("new", "dtype", "facts"),
    [
        (many(1e6), torch.float16, "takes 1 of 1001 elements out of its range (1 became infinite)"),
        (many(-1e6, 7e4), torch.float16, "(2 became infinite)"),
        (many(1e-9), torch.float16, "takes 1 of 1001 elements out of its range (1 became zero)"),
        (many(1e6, -1e-9), torch.float16, "(1 became infinite, 1 became zero)"),
        (many(1e39, dtype=torch.float64), torch.float32, "(1 became infinite)"),
        (many(3.4e38), torch.bfloat16, "(1 became infinite)"),
        (many(1e-44), torch.bfloat16, "(1 became zero)"),
        (many(1e6, dtype=torch.bfloat16), torch.float16, "(1 became infinite)"),
        (many(1e6), torch.float8_e5m2, "(1 became infinite)"),
        (many(1000.0), FP8, {"448.0": "1 clipped to 448", "nan": "1 became NaN"}[BEYOND_FP8]),
        (many(1e-4), FP8, "(1 became zero)"),
        (many(300.0), torch.float8_e4m3fnuz, "(1 became NaN)"),
        (many(1e39 + 1j, dtype=torch.complex128), torch.complex64, "(1 became infinite)"),
        (many(1e39, dtype=torch.float64), torch.complex64, "(1 became infinite)"),
        (torch.full((3_000_000,), 1.0).index_fill_(0, torch.tensor([2_999_999]), 1e6),
         torch.float16, "takes 1 of 3000000 elements"),
    ],
)  # fmt: skip
def test_what_leaves_the_range_is_counted(new, dtype, facts):
    made, note = cast(new, dtype)
    assert made.dtype == dtype and made.shape == new.shape
    assert note.startswith("cast from ") and facts in note


@pytest.mark.parametrize(
    ("new", "dtype"),
    [
        (many(math.inf, -math.inf, math.nan, 0.0, -0.0), torch.float16),
        (many(math.inf, math.nan), torch.bfloat16),
        (many(65519.0), torch.float16),  # rounds to 65504
        (many(450.0), FP8),  # rounds to 448
        (many(1.0 + 1e-7), torch.bfloat16),
        (many(65504.0, 6e-8, dtype=torch.float16), torch.float32),
        (many(1e-40, dtype=torch.bfloat16), torch.float64),
        (many(1.0, dtype=torch.float32), torch.complex64),
        (torch.empty(0), torch.float16),
    ],
)
def test_rounding_is_not_counted(new, dtype):
    note = cast(new, dtype)[1]
    assert "range" not in note and note.startswith("cast from ")


def test_more_than_the_stated_share_is_refused():
    of = 1000
    new = torch.ones(of)
    new[: int(MOST_LOST * of)] = 1e6
    assert "takes 10 of 1000 elements" in cast(new, torch.float16)[1]
    new[int(MOST_LOST * of)] = -1e6
    with pytest.raises(GraftRefused) as refused:
        cast(new, torch.float16)
    assert str(refused.value) == (
        "a cast from float32 to float16 takes 11 of 1000 elements out of its range (11 became "
        "infinite), more than 1%; make the transform return float16, scaled and rounded as you "
        "mean it"
    )


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


def any_of(dtype):
    """Four elements of whatever dtype; packed ones cannot be made otherwise."""
    return torch.zeros(4 * dtype.itemsize, dtype=torch.uint8).view(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("one", DTYPES, ids=str)
def test_every_dtype_is_cast_or_refused_in_our_words(one):
    for other in DTYPES:
        try:
            made, note = check_replacement(any_of(one), any_of(other))
        except (GraftRefused, TransformError) as refused:
            assert ";" in str(refused), refused
        else:
            assert made.dtype == other and (note == "") is (one == other)
            overwrite(any_of(other), made)


def test_what_torch_cannot_do_is_said_with_both_dtypes(monkeypatch, record, replay):
    def cannot(*args):
        raise NotImplementedError("\"copy_kernel\" not implemented for 'Half'")

    monkeypatch.setattr("replayer.casts._between_floats", cannot)
    with pytest.raises(GraftRefused) as refused:
        cast(torch.ones(2), torch.float16)
    assert str(refused.value) == (
        "torch cannot cast float32 to float16 on cpu; make the transform return float16"
    )
    monkeypatch.setattr("replayer.replaced.difference", cannot)

    def job(rank):
        kept = torch.ones(2)
        tap("h", kept)

    record(job)
    (session,) = replay(job)
    assert session.log()["message"].to_list() == [
        "not measured: torch cannot compare float32 with float32 on cpu"
    ]


def test_other_errors_keep_their_words(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("replayer.casts._between_floats", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        cast(torch.ones(2), torch.float16)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch 2.7")
@pytest.mark.parametrize("new", [torch.ones(2), torch.tensor([-1.0]), torch.tensor([2])])
def test_a_dtype_of_scales_is_no_target(new):
    with pytest.raises(GraftRefused, match="has powers of two alone, as scales are"):
        cast(new, torch.float8_e8m0fnu)


def test_a_refused_cast_leaves_the_target_and_the_gradient_as_they_were(record, replay):
    def job(dtype):
        x = torch.tensor([1.0, 1e6], requires_grad=True)
        h = tap("h", (x * 1).to(dtype), grad=True)
        (h * 1).sum().backward(torch.tensor(1.0, dtype=dtype))
        return x.grad.tolist(), h.tolist()

    record(lambda rank: job(torch.float32))
    got = []
    (session,) = replay(lambda rank: got.append(job(torch.float16)))
    assert outcomes(session) == ["error", "grafted"]
    assert got == [([1.0, 1.0], [1.0, math.inf])]


@pytest.mark.parametrize(
    ("record_dtype", "target_dtype", "whose"),
    [
        (torch.bfloat16, FP8, "the target is float8_e4m3fn"),
        (FP8, FP8, "the target is float8_e4m3fn"),
        (FP8, torch.bfloat16, "the record is float8_e4m3fn"),
        (torch.bfloat16, torch.float32, ""),
    ],
)
def test_a_dtype_that_goes_with_a_scale_is_warned_of_once(
    record, replay, capsys, record_dtype, target_dtype, whose
):
    def job(dtype):
        def run(rank):
            for layer in range(2):
                kept = torch.ones(4).to(dtype)
                tap("k", kept, layer=layer)

        return run

    record(job(record_dtype))
    (session,) = replay(job(target_dtype))
    assert outcomes(session) == ["grafted"] * 2
    err = capsys.readouterr().err
    messages = session.log()["message"].to_list()
    if not whose:
        assert err == "" and "scale" not in messages[0]
        return
    assert err.count("to which a scale may belong") == 1 and whose in err
    assert all(f"{whose}, to which a scale may belong" in message for message in messages)
    (session,) = replay(job(target_dtype), transform=lambda g: g.received_list[0])
    assert "scale" not in session.log()["message"][0] and capsys.readouterr().err == ""
