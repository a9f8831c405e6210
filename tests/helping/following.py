"""What rows are told apart while a model runs, and tiny models to run."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from importlib import util

import pytest
import token_oracle as oracle
import torch

from recorder import Recorder, follow_rows
from recorder.taps.around import rows_around

has_transformers = util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not has_transformers, reason="needs transformers")

_numbers = itertools.count()


class Seen(list):
    """The ids that held at each call of a module: {dims: nested lists}."""

    def look(self, *call):
        self.append({" ".join(one.names): one.taken().ids.tolist() for one in rows_around()})


@contextmanager
def recording(tmp_path, **options):
    """Record what nobody taps, so that taps would be heard."""
    with Recorder(tmp_path / f"recording-{next(_numbers)}", **options) as session:
        yield session


@contextmanager
def followed(tmp_path, model, rows="auto", at=None):
    """Yield what rows are told apart at a module, by default the first that the model holds."""
    seen = Seen()
    at = at if at is not None else next(one for one in model.modules() if one is not model)
    with recording(tmp_path), follow_rows(model, rows):
        handle = at.register_forward_hook(seen.look)
        try:
            yield seen
        finally:
            handle.remove()


def tiny_config(kind="Llama", **options):
    import transformers

    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    if kind == "Llama":
        sizes.update(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return getattr(transformers, f"{kind}Config")(**{**sizes, **options})


def tiny(name="LlamaForCausalLM", seed=0, **options):
    """Make a tiny model of transformers."""
    import transformers

    torch.manual_seed(seed)
    kind = name.partition("For")[0].removesuffix("Model").removesuffix("LMHead")
    return getattr(transformers, name)(tiny_config(kind, **options)).eval()


def padded(rows, side="left", pad=0):
    """Return sequences as a batch and its mask."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    none = [[0] * (width - len(row)) for row in rows]
    if side == "left":
        pairs = [(f + row, n + o) for f, row, n, o in zip(fill, rows, none, ones, strict=True)]
    else:
        pairs = [(row + f, o + n) for f, row, n, o in zip(fill, rows, none, ones, strict=True)]
    return torch.tensor([one for one, _ in pairs]), torch.tensor([one for _, one in pairs])


def beside(rows, side="left", width=None):
    """Return the oracle's ids of sequences as a padded batch has them."""
    width = width or max(map(len, rows))
    found = []
    for row in rows:
        fill = [-1] * (width - len(row))
        ids = oracle.ids(row)
        found.append(fill + ids if side == "left" else ids + fill)
    return found
