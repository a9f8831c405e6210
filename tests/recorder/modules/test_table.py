"""Tap tables: what they hold, and where in their text a mistake is."""

from __future__ import annotations

import pytest

from recorder.errors import UsageError
from recorder.modules import table
from recorder.modules.table import parse_table

GOOD = """
[hf]
roots = ["Llama*"]
layer = "layer_number - 1"
axes = { sp = "tp if sequence_parallel" }
[hf.sizes]
r = "num_attention_heads / num_key_value_heads"
half = 2
[hf.taps]
"model.layers.{layer}.mlp" = { tap = "mlp_out", dims = "b s h", tags = { kind_of = "dense" } }
"lm_head" = "logits"
[other.taps]
"x > pkg.f" = { tap = ["a", "b"], dims = ["b s", "b"] }
"""


def test_a_table_has_a_section_for_each_system():
    found = parse_table(GOOD, "my.toml")
    hf, other = found.sections
    assert (hf.name, other.name) == ("my.toml:hf", "my.toml:other")
    assert hf.roots == ("Llama*",) and hf.sizes["half"] == 2
    assert hf.axes["sp"][0] == "tp"
    mlp, head = hf.rows
    assert mlp.taps == ("mlp_out",) and mlp.dims == ("b s h",) and mlp.where == "my.toml:10"
    assert mlp.tags == {"kind_of": "dense"}
    assert head.taps == ("logits",) and head.dims == ()
    assert other.rows[0].taps == ("a", "b")


def test_a_table_of_one_system_needs_no_section():
    (only,) = parse_table('[taps]\n"a.b" = "x"\n', "t.toml").sections
    assert only.name == "t.toml" and only.rows[0].path.modules == "a.b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[taps]\n"a" = \n', "t.toml:2:"),
        ('[taps]\n"a..b" = "x"\n', "t.toml:2:1: the path 'a..b' cannot be read: two dots"),
        ('[taps]\n\n"a" = { tap = "x", dim = "b" }', "t.toml:3:20: a row has no 'dim'; is dims"),
        ('[taps]\n"a" = { tap = "x", dims = "b s[" }', "t.toml:2:20: the dims 'b s"),
        ('[taps]\n"a" = { dims = "b" }', "t.toml:2:1: it names no tap"),
        ('[taps]\n"a" = 3', "t.toml:2:1: a row is"),
        ('[taps]\n"a" = { tap = ["x", "y"] }', "t.toml:2:9: several taps are those of a function"),
        ('[taps]\n"a > p.f" = { tap = ["x","y"], dims = ["b","b","b"] }', "2 taps have 3 dims"),
        ('[taps]\n"a" = { tap = "x", tags = { step = 1 } }', "'step' cannot be a tag"),
        ('[taps]\n"a.{n}" = { tap = "x", tags = { n = 1 } }', "'n' stands in the path already"),
        ('[taps]\n"a" = { tap = "x", grad = 1 }', "grad is true or false"),
        ('[taps]\n"a" = "x"\n[sizes]\nr = "1 +"', "t.toml:4:1: '1 \\+' is no expression"),
        ('[taps]\n"a" = "x"\n[sizes]\nr = -1', "t.toml:4:1: the size of r is a number from 1"),
        ('[hf]\nlayers = 3\n[hf.taps]\n"a" = "x"', "t.toml:2:1: 'layers' is not one of"),
        ('[hf]\n[hf.tabs]\n"a" = "x"', "the section 'hf' has no .hf.taps.; is 'tabs' meant"),
        ("[taps]\n", "names no tap"),
        ('sizes = 5\n[taps]\n"a" = "x"', "t.toml:1:1: sizes is a table"),
        ('axes = "tp"\n[taps]\n"a" = "x"', "t.toml:1:1: axes is a table"),
        ('step = "n"\n[taps]\n"a" = "x"', "t.toml:1:1: 'step' is not one of"),
        ("a = " + 3000 * "[" + 3000 * "]", "too deeply nested"),
        ("", "names no tap"),
    ],
)
def test_a_mistake_is_refused_with_line_and_column(text, message):
    with pytest.raises(UsageError, match=message):
        parse_table(text, "t.toml")


def test_a_table_is_found_by_file_and_section(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(GOOD)
    (whole,) = table.load(str(file))
    (one,) = table.load(f"{file}:other")
    assert len(whole.sections) == 2 and [s.name for s in one.sections] == ["my.toml:other"]
    with pytest.raises(UsageError, match="no section 'nothing'; it has hf, other"):
        table.load(f"{file}:nothing")


def test_a_table_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"there is no tap table 'no/such\.toml'"):
        table.load("no/such.toml")


def test_a_table_that_comes_with_the_product_is_sound():
    for name in table.known():
        (found,) = table.load(name)
        assert all(section.roots for section in found.sections), name
