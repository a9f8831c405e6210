"""Rows of a program that nobody edits: whatever computed a token, it meets itself.

One tiny Llama generates from prompts padded on the left, by continuous batching, or runs whole
sequences padded on the right; each is grafted onto the others, and held against them.
"""

from __future__ import annotations

import sys
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

import pytest
import serving
import token_oracle as oracle
import torch
from click.testing import CliRunner

from recorder import Recorder, Recording, declare_mesh
from recorder.taps.around import rows_around
from replayer import Replayer, read_log
from replayer.cli import main

JOBS = Path(__file__).parent.parent / "jobs"
JOB = JOBS / "generate.py"


def is_there(version):
    if util.find_spec("transformers") is None:
        return False
    return tuple(map(int, metadata.version("transformers").split(".")[:2])) >= version


pytestmark = pytest.mark.skipif(not is_there((5, 20)), reason="needs transformers 5.20")
BOTH = {"taps": "auto", "rows": "auto"}
NAMES = 34  # taps of a forward


@pytest.fixture(scope="module")
def job():
    spec = util.spec_from_file_location("generate_job", JOB)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sequences(job):
    return job.generate(job.made())


@pytest.fixture(scope="module")
def ways(job, sequences):
    """Each way to run the same sequences, given a model."""
    return {
        "generate": lambda model: job.generate(model),
        "batched": lambda model: job.batched(model),
        "full": lambda model: job.full(model, sequences),
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, job, ways):
    """Return the clean recording of each way, made once."""
    made = {}

    def recorded(way):
        if way not in made:
            made[way] = tmp_path_factory.mktemp("ways") / way
            with Recorder(made[way], **BOTH):
                ways[way](job.made())
        return made[way]

    return recorded


def rows_in(path, name="hidden", layer=1):
    """Return each row of a tap by its id."""
    run, found = Recording.open(path), {}
    for row in run.manifest().iter_rows(named=True):
        if row["name"] == name and row.get("layer") == layer and row["kind"] == "tensor":
            [taken] = run.ids(row)
            values = run.read(row).flatten(0, 1)
            found |= dict(zip(taken.ids.flatten().tolist(), values, strict=True))
    found.pop(-1, None)
    return found


def ids_of(sequences):
    return [oracle.ids(row) for row in sequences]


def test_every_way_has_the_rows_of_the_oracle(recorded, sequences):
    """Without the last token of each sequence, which nothing but a whole forward computes."""
    due = {one for row in ids_of(sequences) for one in row}
    last = {row[-1] for row in ids_of(sequences)}
    for way, expected in [("generate", due - last), ("batched", due - last), ("full", due)]:
        assert set(rows_in(recorded(way))) == expected, way
        assert set(rows_in(recorded(way), "attn_norm", 0)) == expected, way
    prompts = [len(row) - 5 for row in sequences]
    heads = {one for row, n in zip(ids_of(sequences), prompts, strict=True) for one in row[n - 1 :]}
    assert set(rows_in(recorded("generate"), "logits", None)) == heads - last
    assert heads - last <= set(rows_in(recorded("batched"), "logits", None)) <= due
    assert set(rows_in(recorded("full"), "logits", None)) == due


WAYS = ("generate", "batched", "full")
PAIRS = [(a, b) for a in WAYS for b in WAYS]
# Each onto itself in the slow ones.
GRAFTED = [pytest.param(a, b, marks=pytest.mark.slow if a == b else ()) for a, b in PAIRS]


@pytest.mark.parametrize(("baseline", "target"), GRAFTED)
def test_rows_are_grafted_onto_whatever_computes_them(
    baseline, target, recorded, ways, job, sequences, tmp_path
):
    """The target has other weights altogether: what it computes on with is the baseline's."""
    model = job.made(seed=1)
    kept = {}

    def keep(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        [ids] = [one.taken().ids.flatten().tolist() for one in rows_around()]
        kept.update(zip(ids, output.detach().flatten(0, 1).clone(), strict=True))

    with Replayer(recorded(baseline), out=tmp_path / "out", **BOTH) as replay:
        handles = []

        def begin(*_):  # once the taps are there, after which it looks
            if not handles:
                handles.append(model.model.layers[1].register_forward_hook(keep))

        model.register_forward_pre_hook(begin)
        result = ways[target](model)
    if baseline in ("full", target):  # nothing is missing, and no record is left over
        assert replay.problems(strict=True) == []
    log = replay.log()
    assert set(log["outcome"]) == {"grafted"}, log.filter(log["outcome"] != "grafted")
    if target != "full":  # the logits that choose tokens are grafted, too
        assert result == sequences
    held = rows_in(recorded(baseline))
    kept.pop(-1, None)
    shared = held.keys() & kept.keys()
    assert len(shared) == sum(map(len, sequences)) - len(sequences) * (
        not (baseline == target == "full")
    )
    assert all(torch.equal(held[one], kept[one]) for one in shared)
    others = kept.keys() - shared
    assert len(others) == (len(sequences) if target == "full" and baseline != "full" else 0)
    taps = log.filter(log["name"] == "hidden")
    assert taps["rows_missing"].sum() == 2 * len(others)


def differing(*words):
    """Run `graft diff`; return its status and what it prints."""
    done = CliRunner().invoke(main, ["diff", *map(str, words)])
    return done.exit_code, done.output


@pytest.mark.parametrize(("a", "b"), [(a, b) for a, b in PAIRS if a < b])
def test_clean_recordings_do_not_differ(a, b, recorded):
    status, said = differing(recorded(a), recorded(b))
    assert status == 0, said
    assert f"{NAMES} pairs: " in said and "no divergence beyond tolerance" in said


def scaled(job, row, position):
    """Return a model that makes one token's hidden state behind the first layer larger."""
    model = job.made()
    id = oracle.ids(row[: position + 1])[-1]

    def fault(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        [ids] = [one.of() for one in rows_around() if one.names == ("b", "s")]
        hidden[ids == id] *= 1.25

    def begin(*_):  # before the taps of what it changes
        if not handles:
            layer = model.model.layers[0]
            handles.append(layer.register_forward_hook(fault, prepend=True))

    handles = []
    model.register_forward_pre_hook(begin)
    return model


@pytest.mark.parametrize("way", ["generate", "batched", "full"])
def test_a_token_whose_hidden_state_is_off_at_one_step_is_named(
    way, recorded, ways, job, sequences, tmp_path
):
    row, position = sequences[1], 13  # behind the prompt: generated at a step of its own
    with Recorder(tmp_path / "b", **BOTH):
        ways[way](scaled(job, row, position))
    status, said = differing(recorded("full"), tmp_path / "b")
    assert status == 1, said
    first = next(line for line in said.split("first divergence beyond tolerance")[1:])
    assert first.startswith(": hidden layer=0"), said
    assert f"token {row[position]} at position {position}" in first.partition(", ")[0], said


def test_a_weight_that_is_off_is_named(recorded, ways, job, tmp_path):
    model = job.made()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    with Recorder(tmp_path / "b", **BOTH):
        ways["generate"](model)
    status, said = differing(recorded("full"), tmp_path / "b")
    assert status == 1
    assert "first divergence beyond tolerance: attn_out layer=1" in said


class Stepping(serving.Batch):
    """A batch of whole prompts, with what a server of its kind knows of it beside."""

    @property
    def places(self):
        return torch.cat([torch.arange(n) + 16 * (i + 1) for i, n in enumerate(self.lengths)])

    @property
    def bounds(self):
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def of_vllm(self):
        blocks = torch.arange(1, len(self.lengths) + 1)[:, None]
        layer = SimpleNamespace(
            query_start_loc=self.bounds, seq_lens=torch.tensor(self.lengths),
            block_table=blocks, slot_mapping=self.places,
        )  # fmt: skip
        return SimpleNamespace(attn_metadata={"layers.0": layer})

    forward_mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: False)
    extend_seq_lens = property(lambda self: torch.tensor(self.lengths))
    req_pool_indices = property(lambda self: torch.arange(len(self.lengths)))
    out_cache_loc = property(lambda self: self.places)

    @property
    def req_to_token_pool(self):
        table = torch.arange(16)[None] + 16 * (self.req_pool_indices + 1)[:, None]
        return SimpleNamespace(req_to_token=table)


@pytest.mark.parametrize("baseline", ["generate", "batched"])
@pytest.mark.parametrize("system", ["vllm", "sglang"])
def test_rows_of_transformers_are_grafted_onto_a_server(
    system, baseline, recorded, job, sequences, tmp_path, monkeypatch
):
    """One of another vocabulary of names, in which all requests stand in one row."""
    monkeypatch.setattr(serving, "Batch", Stepping)
    context = SimpleNamespace(get_forward_context=lambda: serving.CURRENT[0].of_vllm())
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)
    rows = [torch.tensor(row) for row in sequences]
    model = serving.served(job.made(), system, rows)
    declare_mesh(tp=(0, 1))  # a server's groups say so
    with Replayer(recorded(baseline), filter='name != "next_logits"', **BOTH) as replay:
        model.serve(rows)
    declare_mesh()
    log = replay.log()
    assert set(log["outcome"]) == {"grafted"} and log.height > 25
    assert set(log["rows_found"]) == {sum(map(len, sequences)) - len(sequences)}
    assert log["rel_diff"].max() < 1e-10


@pytest.fixture
def graft(shell):
    """Run `graft` in the folder of a test."""
    return lambda *words, **options: shell(shell.graft, *words, **options)


def words(shell, *how):
    return ["--", *shell.python, JOB, *how]


@pytest.mark.processes
def test_generate_is_grafted_onto_a_whole_forward_by_command(shell, graft):
    taps = ["--taps", "auto", "--rows", "auto"]
    done = graft("record", "-o", "a", taps, words(shell, "generate"))
    assert done.returncode == 0, done.stderr
    done = graft("replay", "a", "-o", "out", taps, words(shell, "full", "--seed", "1"))
    assert done.returncode == 0, done.stderr
    log = read_log(shell.folder / "out")
    assert set(log["outcome"]) == {"grafted"}
    assert (log["rows_found"] > 0).all()


@pytest.mark.slow
@pytest.mark.processes
def test_ways_by_command_in_all_directions(shell, graft):
    taps = ["--taps", "auto", "--rows", "auto"]
    for way in ("generate", "batched", "full"):
        done = graft("record", "-o", way, taps, words(shell, way))
        assert done.returncode == 0, done.stderr
    for a in ("generate", "batched", "full"):
        for b in ("generate", "batched"):
            done = graft("replay", a, "-o", f"{a}-{b}", taps, words(shell, b, "--seed", "1"))
            assert done.returncode == 0, done.stderr
        assert graft("diff", a, "full").returncode == 0
