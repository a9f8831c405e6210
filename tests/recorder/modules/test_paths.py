"""Paths of modules: what they fit, which tags they give, and how they are refused."""

from __future__ import annotations

import pytest

from recorder.errors import UsageError
from recorder.paths import parse_path


@pytest.mark.parametrize(
    ("path", "name", "tags"),
    [
        ("model.layers.{layer}.mlp", "model.layers.3.mlp", {"layer": 3}),
        ("model.layers.{layer}.mlp", "model.layers.3.mlp.up", None),
        ("model.layers.{layer}.mlp", "model.layers.a.mlp", {"layer": "a"}),
        ("h.{layer+1}.norm", "h.1.norm", {"layer": 0}),
        ("h.{layer+1}.norm", "h.0.norm", None),
        ("h.{layer-1}.norm", "h.0.norm", {"layer": 1}),
        ("h.{layer+1}.norm", "h.a.norm", None),
        ("layer_{layer}.mlp", "layer_07.mlp", {"layer": 7}),
        ("e.{layer}.experts.{expert}", "e.1.experts.12", {"layer": 1, "expert": 12}),
        ("model.layers.*.self_attn", "model.layers.3.self_attn", {}),
        ("model.layers.*.self_attn", "model.layers.3.x.self_attn", None),
        ("*.mlp", "model.layers.3.mlp", {}),
        ("*.mlp", "mlp", {}),
        ("*_proj", "q_proj", {}),
        ("*_proj", "mlp.q_proj", None),
        ("model.**.q_proj", "model.q_proj", {}),
        ("model.**.q_proj", "model.a.b.q_proj", {}),
        ("model.**", "model.a.b", {}),
        ("**", "a.b.c", {}),
        ("a.b", "aXb", None),
    ],
)
def test_a_path_fits_names_and_gives_their_tags(path, name, tags):
    assert parse_path(path).fits(name) == tags


@pytest.mark.parametrize(
    ("path", "side", "members", "is_gradient"),
    [
        ("a", "output", (), False),
        ("a:output.0", "output", ("0",), False),
        ("a:output.hidden_states", "output", ("hidden_states",), False),
        ("a:input", "input", (), False),
        ("a:input.input_ids", "input", ("input_ids",), False),
        ("a:grad_output", "output", (), True),
        ("a:grad_input.0", "input", ("0",), True),
        ("a:weight", "parameter", ("weight",), False),
        ("a:lora_A.default.weight", "parameter", ("lora_A", "default", "weight"), False),
        (":output.logits", "output", ("logits",), False),
    ],
)
def test_a_place_says_what_of_a_call_is_meant(path, side, members, is_gradient):
    place = parse_path(path).place
    assert (place.side, place.members, place.is_gradient) == (side, members, is_gradient)


def test_a_function_is_named_as_it_is_imported():
    path = parse_path("m.{layer}.attn > pkg.mod.rope:output.0")
    assert path.function == "pkg.mod.rope" and path.fits("m.2.attn") == {"layer": 2}


@pytest.mark.parametrize(
    ("path", "called"),
    [
        ("model.layers.{layer}.mlp", "model.layers.mlp"),
        ("model.layers.*.mlp", "model.layers.1.mlp"),
        ("*.mlp:input", "model.layers.1.mlp:input"),
        ("model.layers.1.mlp:weight", "model.layers.1.mlp:weight"),
    ],
)
def test_a_tap_is_called_as_its_module_without_the_tags(path, called):
    assert parse_path(path).called("model.layers.1.mlp") == called


def test_a_path_says_below_which_module_it_fits():
    path = parse_path("model.layers.{layer}.mlp")
    assert path.fits_below("model.layers.0.mlp") == ""
    assert path.fits_below("policy.model.layers.0.mlp") == "policy"
    assert path.fits_below("other.layers.0.mlp") is None
    assert path.without("model").fits("layers.0.mlp") == {"layer": 0}


@pytest.mark.parametrize(
    ("path", "fact"),
    [
        ("", "it is empty"),
        ("a..b", "two dots"),
        ("a.b.", "two dots"),
        ("a.{b", r"'{' stands in"),
        ("a.{}", "names no tag"),
        ("a.{1x}", "names no tag"),
        ("a.{step}", "has another meaning"),
        ("a.{x}.{x}", "given twice"),
        ("a b", "' ' stands in"),
        ("a:", "nothing stands behind"),
        ("a:out put", "is not output, input"),
        ("a > 1rope", "is no function"),
        ("a > ", "is no function"),
    ],
)
def test_what_is_no_path_is_refused_with_the_reason(path, fact):
    with pytest.raises(UsageError, match=fact):
        parse_path(path)
