"""The recipes of the READMEs do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from recorder import Recorder, Recording
from replayer import Replayer, localize

README = (Path(__file__).parent.parent / "recorder" / "README.md").read_text()


def recipe(heading: str) -> str:
    """Return the first Python block under a heading."""
    text = README.split(f"\n{heading}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


class Block(torch.nn.Module):
    """One layer of a model that is built as Hugging Face builds them."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Decoder(torch.nn.Module):
    """A model whose layers have the names that the recipe looks for."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return x


def of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(6)[None]
    return model, lambda: model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def of_torch():
    model, x = Decoder(), torch.randn(2, 8)
    return model, lambda: [model(x) for _ in range(4)]


@pytest.mark.parametrize("made", [of_torch, of_transformers])
def test_the_recipe_for_models_that_nobody_edits(made, run, monkeypatch):
    """Record, replay onto itself, and name a fault: 3 layers, 2 modules, and a step a forward."""
    torch.manual_seed(0)
    model, job = made()
    code = recipe("### A Hugging Face model, without edits")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "recipe", "exec"), {"model": model})
    with torch.no_grad():
        with Recorder(run):
            job()
        table = Recording.open(run).manifest()
        assert table.height == 3 * 2 * 4 and sorted(table["step"].unique()) == [0, 1, 2, 3]
        assert sorted(table["layer"].unique()) == [0, 1, 2]
        with Replayer(run, strict=True) as replay:
            job()
        assert set(replay.log()["outcome"]) == {"grafted"} and not replay.log()["changed"].sum()
        next(model.model.layers[1].mlp.parameters()).mul_(1.5)
        (first, *_) = localize(run, job).found.faults
    assert (first.place.name, first.place.tag_values) == ("mlp", {"layer": 1})
