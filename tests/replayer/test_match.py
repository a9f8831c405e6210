"""The index behind every match, against a plain dictionary."""

from __future__ import annotations

import json
import random

import polars as pl
import pytest

from recorder.errors import DamagedRecording, UsageError
from recorder.format.index import Index, nearest
from replayer.match import MatchOn


def manifest(rows):
    return pl.DataFrame(
        rows,
        schema={
            "rank": pl.Int32,
            "seq": pl.Int64,
            "step": pl.Int64,
            "name": pl.String,
            "occurrence": pl.Int32,
            "tags": pl.String,
            "kind": pl.String,
        },
        orient="row",
    )


@pytest.mark.parametrize("seed", range(20))
def test_finds_what_a_dictionary_finds(seed):
    rng = random.Random(seed)
    rows, expected = [], {}
    for rank in range(rng.randint(1, 4)):
        for seq in range(rng.randint(0, 60)):
            tags = {"layer": rng.randint(0, 2)} if rng.random() < 0.7 else {}
            if rng.random() < 0.2:
                tags["recompute"] = True
            key = (
                rng.choice(["tensor", "grad"]),
                rng.choice("ab"),
                json.dumps({k: v for k, v in tags.items() if k != "recompute"}).replace(" ", ""),
                rng.choice([0, 5, 10**9]),
                rng.randint(0, 2),
            )
            second = "recompute" in tags
            at = expected.setdefault(key, {})
            if rank not in at or (at[rank][1] and not second):
                at[rank] = (len(rows), second)
            text = json.dumps(tags, sort_keys=True, separators=(",", ":"))
            rows.append((rank, seq, key[3], key[1], key[4], text, key[0]))
    index = Index.build(manifest(rows))
    for (kind, name, tags, step, occurrence), at in expected.items():
        found = index.find(kind, (name, tags), step, occurrence)
        assert found == {rank: row for rank, (row, _) in at.items()}
    assert index.find("tensor", ("a", "{}"), 1, 0) == {}
    assert index.find("tensor", ("zz", "{}"), 0, 0) == {}


def test_an_empty_manifest_has_nothing():
    index = Index.build(manifest([]))
    assert index.find("tensor", ("a", "{}"), 0, 0) == {}
    assert nearest(index, "tensor", ("a", "{}"), 0, 0) == []


@pytest.mark.parametrize("tags", ["", "[]", "{", "1", "null"])
def test_tags_that_are_no_json_object_are_an_error(tags):
    with pytest.raises(DamagedRecording, match="expected a JSON object"):
        Index.build(manifest([(0, 0, 0, "a", 0, tags, "tensor")]))


def test_match_on_is_read_once():
    assert MatchOn.parse(None).whole
    assert MatchOn.parse("name, layer").tags == ("name", "layer")
    assert not MatchOn.parse("name,layer").use_step and MatchOn.parse("step,name").use_step
    assert MatchOn.parse("order").order
    mapped = MatchOn.parse("name, layer = layer_id")
    assert mapped.tags == ("name", "layer") and mapped.renamed == (("layer", "layer_id"),)
    assert mapped.group("a", {"layer": 3}) == mapped.group_of_target("a", {"layer_id": 3})
    wrong = ["a=", "=b", "a=b,c=b", "a=b,b", "order=x", "x=name", "step=x", "a=rank"]
    for text in ("", "name,,x", "order,x", "rank", "occurrence", *wrong):
        with pytest.raises(UsageError):
            MatchOn.parse(text)
