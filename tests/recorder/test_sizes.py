"""Sizes as people write them."""

from __future__ import annotations

import pytest

from recorder.errors import UsageError
from recorder.sizes import format_size, parse_size


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
