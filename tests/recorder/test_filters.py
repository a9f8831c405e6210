"""The filter language."""

from __future__ import annotations

import pytest

from recorder.errors import FilterError
from recorder.filters import Filter

TAGS = {"name": "attn_out", "layer": 3, "phase": "prefill", "axes": ["tp", "cp"], "ok": True}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("True", True),
        ('name == "attn_out"', True),
        ('name != "attn_out"', False),
        ('name in ("q", "attn_out")', True),
        ('name not in ["q", "k"]', True),
        ('name in {"q"}', False),
        ('"attn" in name', True),
        ("layer < 4 and layer >= 3", True),
        ("0 <= layer < 3", False),
        ("layer % 2 == 1", True),
        ("layer * 2 + 1 == 7 and layer // 2 == 1 and layer / 2 == 1.5 and -layer == -3", True),
        ("layer is None", False),
        ("layer is not None", True),
        ("missing is None", True),
        ("missing == None", True),
        ("missing < 4", False),
        ("missing >= 4", False),
        ("not missing < 4", True),
        ("missing + 1 > 0", False),
        ("-missing == 1", False),
        ('missing in ("a", None)', True),
        ('"a" in missing', False),
        ('"a" not in missing', True),
        ('missing in "abc"', False),
        ("len(missing) == 3", False),
        ('search("tt", name)', True),
        ('match("tt", name)', False),
        ('match("at", name)', True),
        ('fullmatch("attn_.*", name)', True),
        ('search("a", missing)', False),
        ('search("3", layer)', True),
        ('search("tt", name) is not None', True),
        ('search("tt", name) is None', False),
        ('search("zz", name) is not None', False),
        ('search("zz", name) is None', True),
        ('(search("zz", name) or search("yy", name)) is not None', False),
        ('(search("zz", name) or search("tt", name)) is not None', True),
        ('(search("tt", name) and search("zz", name)) is None', True),
        ("(missing or layer) == 3", True),
        ("(layer and missing) is None", True),
        ('search("a", missing) is not None', False),
        ('match("t", name) is not None', False),
        ('fullmatch("attn", name) != None', False),
        ('None is not match("at", name)', True),
        ('layer == 3 and search("tt", name) is not None', True),
        ('not search("zz", name)', True),
        ('"yes" == ("yes" if search("tt", name) else "no")', True),
        ("len(name) == 8", True),
        ('name.startswith("attn")', True),
        ('name.endswith(("in", "out"))', True),
        ('missing.startswith("a")', False),
        ('phase == "prefill" if layer > 2 else False', True),
        ('axes == ("tp", "cp")', True),
        ('"tp" in axes', True),
        ("ok", True),
        ("ok is True", True),
        ('axes in (("tp", "cp"), ("dp",))', True),
        ('axes < ("z",)', True),
        ("", None),
    ],
)
def test_selects(text, verdict):
    if verdict is None:
        with pytest.raises(FilterError, match="it is empty"):
            Filter.parse(text)
    else:
        assert Filter.parse(text)(TAGS) is verdict


@pytest.mark.parametrize(
    ("text", "reason", "place"),
    [
        ("layer.real == 1", "an attribute is not allowed", "layer.real"),
        ('__import__("os")', "__import__ cannot be called", "__import__"),
        ("name[0] == 'a'", "indexing is not allowed", "name[0]"),
        ("[x for x in name]", "a comprehension is not allowed", "[x for x in name]"),
        ("lambda: 1", "a lambda is not allowed", "lambda: 1"),
        ("(x := 1)", "an assignment is not allowed", "x := 1"),
        ("layer ** 9", "only + - * / // % are allowed", "layer ** 9"),
        ("~layer", "operator ~ is not allowed", "~layer"),
        ("name.upper() == 'A'", "the only methods are startswith and endswith", "name.upper"),
        ("search(name, 'a')", "must be a string literal", "name"),
        ("search('(', name)", "not a regular expression", "'('"),
        ("search('a{99999999999}', name)", "not a regular expression", "'a{99999999999}'"),
        ("search('a', name) is True", "gives a match or None", "search('a', name) is True"),
        ("search('a', name) == 1", "gives a match or None", "search('a', name) == 1"),
        ("False != match('a', name)", "match gives a match", "False != match('a', name)"),
        ("search('a')", "takes a pattern and a tag", "search('a')"),
        ("len(name, 1)", "len takes one argument", "len(name, 1)"),
        ("search == 1", "search is a function", "search"),
        ("f'{name}' == 1", "an f-string is not allowed", "f'{name}'"),
        ("name == b'a'", "a bytes literal is not allowed", "b'a'"),
        ("search('ä', näme.x)", "an attribute is not allowed", "näme.x"),
        ("layer is 1000", "`is` compares with None, True or False only", "layer is 1000"),
        ("len(name=1)", "keyword arguments are not allowed", "len(name=1)"),
    ],
)
def test_refuses_anything_else_pointing_at_the_place(text, reason, place):
    with pytest.raises(FilterError) as caught:
        Filter.parse(text)
    assert reason in caught.value.reason
    assert text[caught.value.column :][: caught.value.width] == place
    line, marker = str(caught.value).splitlines()[1:]
    assert line.strip() == text
    assert line[marker.index("^") :].startswith(place)


def test_refuses_what_is_no_expression():
    with pytest.raises(FilterError, match="not a Python expression"):
        Filter.parse("layer <")


def test_refuses_nesting_and_length_beyond_reason():
    for text in ("(" * 5000 + "1" + ")" * 5000, "not " * 2400 + "x", "x" * 20_000):
        with pytest.raises(FilterError):
            Filter.parse(text)


def test_a_comparison_that_python_cannot_make_is_an_error_with_its_place():
    with pytest.raises(FilterError, match="not supported between"):
        Filter.parse('layer < "4"')(TAGS)
    with pytest.raises(FilterError, match="only numbers can be multiplied"):
        Filter.parse("name == 'a' * 99999999999")(TAGS)


def test_a_filter_may_run_over_lines():
    assert Filter.parse('name == "attn_out"\n  and layer == 3\n')(TAGS)


def test_names_the_tags_it_reads():
    assert Filter.parse('search("a", name) and layer < 4').names == {"name", "layer"}


def test_says_why_it_selected_nothing():
    filter = Filter.parse('layr < 4 and name == "attn_ot"')
    why = filter.why_nothing({"layer", "phase"}, {"attn_out", "mlp_out"})
    assert "no tap carried the tag 'layr', closest: layer" in why
    assert "no tap is named 'attn_ot', closest: attn_out" in why


@pytest.mark.parametrize(
    ("text", "meant", "column"),
    [
        ("name = 'q'", "name == 'q'", 5),
        ("layer=3 and name=='x'", "layer==3 and name=='x'", 5),
        ("layer >= 3 and name = 'x'", "layer >= 3 and name == 'x'", 20),
    ],
)
def test_one_equals_sign_gets_the_comparison_that_was_meant(text, meant, column):
    with pytest.raises(FilterError) as caught:
        Filter.parse(text)
    assert caught.value.reason == f"= assigns; compare with ==: {meant}"
    assert caught.value.column == column


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name == q", 'which is a tap; its name is text: name == "q"'),
        ("q", 'which is a tap; its name is text: name == "q"'),
        ("name in (q, 'k') and layer == 1", """name is text: name in ("q", 'k') and layer == 1"""),
        ("layer == 9 and name == 'q'", "none has layer == 9: layer is 0 to 3"),
        ("layer in (7, 8)", "none has layer in (7, 8): layer is 0 to 3"),
        ("layer > 3", "none has layer > 3: layer is 0 to 3"),
        ("phase == 'x'", "none has phase == 'x': phase is 'decode', 'prefill'"),
        ("layr == 1", "no tap carried the tag 'layr', closest: layer"),
        ("zzz == 1", "no tap carried the tag 'zzz'; tags seen: name, layer, phase"),
    ],
)
def test_what_selects_nothing_is_told_what_there_is(text, said):
    values = {"layer": {0, 1, 2, 3}, "phase": {"prefill", "decode"}}
    assert said in Filter.parse(text).why_nothing(values, ["q", "k"], values)


@pytest.mark.parametrize(
    "text", ["layer == None", "layer is None", "name == 'z' and not layer == 7", "layer == 7 or 0"]
)
def test_what_need_not_hold_is_not_blamed(text):
    told = Filter.parse(text).why_nothing({"layer": {0}}, ["q"], {"layer": {0}})
    assert "none has" not in told


def test_what_stands_in_quotes_is_left_as_it_is():
    with pytest.raises(FilterError) as caught:
        Filter.parse('name == "a=b" and layer = 3')
    assert caught.value.reason.endswith('name == "a=b" and layer == 3')
