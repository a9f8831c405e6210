"""Faithful capture: what is recorded is what was there, bit for bit, or nothing."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, bits, tap
from recorder.bits import bytes_of, pieces
from recorder.verify import Checker
from recorder.writing.staging import Staging

DTYPES = sorted(
    {
        value
        for name in dir(torch)
        if isinstance(value := getattr(torch, name), torch.dtype)
        and "quint" not in name
        and "qint" not in name
    },
    key=str,
)


def raw(t: torch.Tensor) -> bytes:
    """The tensor's bytes in row-major order, whatever its dtype."""
    if t.is_complex():
        t = torch.view_as_real(t.contiguous())
    return bytes(bytes_of(t.detach().contiguous().view(torch.uint8)))


def of_random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    bits = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        return bits.view(torch.uint8) > 127
    return bits.view(dtype)


def recorded(record, value, name="x"):
    return record(lambda rank: tap(name, value)).load(0, name)


@pytest.mark.filterwarnings("ignore:.*support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(record, dtype):
    t = of_random_bits(dtype, 3, 4)  # random bits: every NaN payload and subnormal
    back = recorded(record, t)
    assert back.dtype == dtype and back.shape == t.shape
    assert raw(back) == raw(t)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: torch.tensor(3.5),
        lambda t: torch.empty(0, 3),
        lambda t: t.t(),
        lambda t: t[::2, 1::3],
        lambda t: t[:1].expand(5, 6),
        lambda t: t.flatten().as_strided((4, 3), (2, 1)),
        lambda t: t.unsqueeze(0).permute(2, 0, 1),
        lambda t: t[3],
        lambda t: t.to(torch.complex64).mul(1j).conj(),
        lambda t: t.to(torch.complex64).mul(1j).conj().imag,
        lambda t: torch.nn.Parameter(t),
        lambda t: t.requires_grad_().mul(2),
        lambda t: t.to(memory_format=torch.contiguous_format),
        lambda t: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda t: torch.nn.Buffer(t),
    ],
)
def test_views_of_every_kind_come_back_as_their_elements(record, make):
    t = make(torch.arange(24.0).view(4, 6))
    back = recorded(record, t)
    assert back.shape == t.shape and torch.equal(back, t.detach().resolve_conj().resolve_neg())


def test_a_nan_keeps_its_payload(record):
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32)  # quiet, signalling
    back = recorded(record, bits.view(torch.float32))
    assert torch.equal(back.view(torch.int32), bits)


def test_under_inference_mode(record):
    with torch.inference_mode():
        t = torch.randn(3)
        back = recorded(record, t)
    assert torch.equal(back, t.clone())


def test_what_happens_afterwards_in_place_does_not_reach_the_recording(record):
    def job(rank):
        for i in range(50):
            t = torch.full((1000,), float(i))
            tap("x", t, i=i)
            t.zero_()

    run = record(job)
    assert [run.load(0, "x", i=i)[0].item() for i in range(50)] == list(range(50))


def test_a_tensor_larger_than_the_staging_memory_is_recorded_whole(record):
    big = torch.arange(100_000, dtype=torch.int64).view(100, 1000)
    run = record(lambda rank: [tap("c", big), tap("t", big.t())], staging=64 << 10)
    assert torch.equal(run.load(0, "c"), big) and torch.equal(run.load(0, "t"), big.t())
    # The room of each part is needed for the next: statistics are there once all is read anyway.
    assert not [problem for rank in Checker(run.path).ranks() for problem in rank.problems]
    assert Recording.open(run.path).rows()["mean"].to_list() == pytest.approx([49999.5] * 2)


@pytest.mark.parametrize("first", ["grad", "vmap", "inference", "meta"])
def test_what_is_plain_is_known_wherever_it_is_first_asked(monkeypatch, first):
    monkeypatch.setattr(bits, "_plain", {})
    x = torch.ones(3)

    def ask(y):
        assert not bits.is_plain(y) and not bits.is_plain(y, "cuda")
        return y.sum()

    if first == "inference":
        with torch.inference_mode():
            assert bits.is_plain(torch.ones(3))
    elif first == "meta":
        ask(x.to("meta"))
    else:
        (torch.func.grad if first == "grad" else torch.vmap)(ask)(torch.ones(2, 3))
    assert bits.is_plain(x) and bits.is_plain(torch.nn.Parameter(x))
    assert not bits.is_plain(x, "cuda") and not bits.is_plain(x.to("meta"))


def test_under_another_default_device_and_dtype(record):
    t = torch.ones(2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            back = recorded(record, t)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(back, t)


def _quantized():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*prototype.*", "ignore:.*beta state.*")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "its layout is sparse_coo"),
        (_quantized, "it is quantized"),
        (lambda: torch.ones(2, device="meta"), "it is on the meta device"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "it is a nested tensor",
        ),
    ],
)
def test_what_cannot_be_captured_faithfully_is_refused_with_a_reason(record, capsys, make, reason):
    value = make()
    assert record(lambda rank: tap("x", value)).rows().height == 0
    err = capsys.readouterr().err
    assert "tap 'x' at " in err and "is not recorded: " + reason in err


def test_inside_vmap_is_refused_with_a_reason(record, capsys):
    run = record(lambda rank: torch.vmap(lambda t: tap("x", t * 2))(torch.ones(2, 3)))
    assert run.rows().height == 0
    assert "it is inside torch.func" in capsys.readouterr().err


def test_inside_cuda_graph_capture_is_refused_with_a_reason(record, capsys, monkeypatch):
    monkeypatch.setattr(bits, "is_capturing", lambda tensor: True)
    apart = torch.ones(4)[::2]  # on the CPU, where nothing is captured, but not at first sight
    assert record(lambda rank: tap("x", apart)).rows().height == 0
    assert "a CUDA graph is being captured" in capsys.readouterr().err


def test_pieces_follow_one_another_and_keep_to_the_limit():
    t = torch.arange(3 * 5 * 7, dtype=torch.int64).view(3, 5, 7)
    for tensor in (t, t.permute(2, 0, 1), t[:, ::2]):
        for limit in (8, 24, 100, 10_000):
            parts = list(pieces(tensor, limit))
            assert all(p.numel() * 8 <= limit for p in parts)
            assert torch.equal(torch.cat([p.flatten() for p in parts]), tensor.flatten())


def test_staging_reuses_its_memory_and_never_hands_out_a_byte_twice():
    staging = Staging(1024)
    held = []
    for i in range(200):
        t = torch.full(((i * 37) % 200 + 1,), i % 250, dtype=torch.uint8)
        while sum(p.nbytes for p, _ in held) + 3 * 64 * (len(held) + 1) + t.numel() > 900:
            part, value = held.pop(0)
            assert set(staging.view(part).tolist()) == {value}
            staging.release([part])
        held.append((staging.put(t, 1, hold=True), i % 250))
        held[-1][0].payload = i
    staging.close()
    assert staging.put(torch.zeros(1, dtype=torch.uint8), 1, hold=True) is None


def test_a_recorder_survives_a_job_that_changes_its_tensors_from_another_stream_of_thought(run):
    """Many payload sizes through a small ring, so that it wraps at every offset."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 3000, (300,), generator=generator).tolist()
    with Recorder(run, staging=16 << 10):
        for i, n in enumerate(sizes):
            t = torch.full((n,), i, dtype=torch.int32)
            tap("x", t, i=i)
            t.fill_(-1)
    back = Recording.open(run)
    for i, n in enumerate(sizes):
        assert torch.equal(back.load(0, "x", i=i), torch.full((n,), i, dtype=torch.int32))
