"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest

from recorder.errors import UsageError
from recorder.sizes import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("20GB", 20 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5g", 1_500_000_000),
        ("10 kB", 10_000),
        ("100", 100),
    ],
)
def test_reads(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1 zebibyte", "1iB", 0, True])
def test_refuses_what_is_no_size(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_writes():
    assert [format_size(n) for n in (0, 999, 1500, 2 * 10**9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 GB",
    ]


@pytest.mark.parametrize(
    ("text", "seconds", "back"),
    [
        ("2s", 2.0, "2s"),
        ("500ms", 0.5, "500ms"),
        (" 1.5 ", 1.5, "1.5s"),
        (".25S", 0.25, "250ms"),
        ("2min", 120.0, "120s"),
        (0, 0.0, "0s"),
    ],
)
def test_reads_durations(text, seconds, back):
    assert parse_duration(text) == seconds
    assert format_duration(seconds) == back and parse_duration(back) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1h", "inf", "nan", float("inf"), -1, True, None])
def test_refuses_what_is_no_duration(text):
    with pytest.raises(UsageError, match="is not a duration; write a number of seconds, or 2s"):
        parse_duration(text)
