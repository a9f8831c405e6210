"""What extras say of sequences: lengths, cumulated lengths, a mask, and the side of padding."""

from __future__ import annotations

import json

import pytest

from recorder.errors import LayoutError
from recorder.layouts.lengths import lengths_in, padding_side
from recorder.layouts.parse import parse_dims

MASK = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def lengths(dims="b s", **extras):
    return lengths_in(json.dumps(extras), parse_dims(dims))


def refused(said, dims="b s", **extras):
    with pytest.raises(LayoutError) as caught:
        lengths(dims, **extras)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "mask", [MASK, [[bool(one) for one in row] for row in MASK], [[0.0, 0, 1, 1, 1], [1.0] * 5]]
)
def test_a_mask_gives_the_lengths_and_the_side(mask):
    found = lengths(attention_mask=mask)
    assert (found.real, found.side, found.width) == ((3, 5), "left", 5)
    assert padding_side(json.dumps({"attention_mask": mask})) == "left"
    found = lengths(attention_mask=[row[::-1] for row in mask])
    assert (found.real, found.side) == ((3, 5), "right")


def test_a_mask_of_one_row_is_one_sequence():
    assert lengths("s", attention_mask=[0, 1, 1]).real == (2,)
    assert lengths("b s", attention_mask=[[0, 1, 1]]).real == (2,)


def test_rows_of_a_mask_that_are_full_or_empty_have_no_side():
    found = lengths(attention_mask=[[1, 1], [0, 0]])
    assert (found.real, found.side) == ((2, 0), "")


def test_a_mask_says_nothing_of_how_packed_tokens_are_padded():
    found = lengths("t", attention_mask=MASK)
    assert (found.real, found.room, found.side) == ((3, 5), (3, 5), "")


def test_a_mask_that_is_not_a_list_is_something_else():
    assert lengths(attention_mask="causal") is None


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 0, 1]], "has a hole in row 0, [1, 0, 1]; give one whose rows have their tokens one"),
        ([[1, 1, 1], [0, 1, 0]], "has padding on both sides of the tokens in row 1; cut it to one"),
        ([[0, 1], [1, 0]], "has padding on the left in row 0 and on the right in row 1; pad all"),
        ([[0, 1], [1, 1, 1]], "expected rows of one length, of 0 and 1, one for each sequence"),
        ([[0, 2]], "expected rows of one length, of 0 and 1"),
        ([[[1, 1]]], "expected rows of one length, of 0 and 1"),
        ([[0.0, -1e9]], "expected rows of one length, of 0 and 1"),
    ],
)
def test_a_mask_that_gives_no_lengths_is_refused(mask, said):
    refused(f"extras['attention_mask'] {said}" if "hole" in said else said, attention_mask=mask)


@pytest.mark.parametrize(
    "other", [{"seq_lens": [5, 3]}, {"cu_seqlens": [0, 5, 8]}, {"seq_lens": [3, 4]}]
)
def test_a_mask_must_agree_with_lengths(other):
    refused(
        "[3, 5] by attention_mask; give those of this tensor alone", attention_mask=MASK, **other
    )
    assert lengths(attention_mask=MASK, seq_lens=[3, 5], cu_seqlens=[0, 3, 8]).real == (3, 5)


def test_lengths_that_are_given_twice_must_agree():
    refused("[3, 5] by seq_lens and [5, 3] by cu_seqlens", seq_lens=[3, 5], cu_seqlens=[0, 5, 8])


def test_sides_that_are_given_twice_must_agree():
    said = "padding stands on the right, and their attention mask has it on the left"
    refused(said, attention_mask=MASK, padding="right")
    assert lengths(attention_mask=MASK, padding="left").side == "left"
    refused(
        "stands on the left, and on the right", seq_lens=[3], padding="left", padding_side="right"
    )


@pytest.mark.parametrize("dims", ["h", "v h", "l b2"])
def test_extras_of_what_has_no_sequences_are_not_read(dims):
    assert lengths(dims, seq_lens="none", attention_mask=[[1, 0, 1]]) is None


def test_a_batch_without_a_sequence_has_lengths_and_no_side():
    assert lengths("b v", seq_lens=[3, 5], padding="left").real == (3, 5)
