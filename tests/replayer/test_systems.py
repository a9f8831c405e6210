"""One tiny Llama in four systems, as their users run them, tapped by the tables that come with us.

They compute the same; every row of a table is grafted onto each; what is wrong in one is named.
"""

from __future__ import annotations

import json
from importlib import metadata, util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from replayer import read_log

SYSTEMS = Path(__file__).parent.parent / "jobs" / "systems"

# What must be there for each script, and its ranks. Looked for, not imported: imports may warn.
NEEDS = {
    "hf_llama.py": (["transformers"], 1),
    "litgpt_llama.py": (["litgpt", "lightning", "lightning_utilities", "torchmetrics"], 1),
    "megatron_gpt.py": (["megatron", "megatron.core"], 2),
    "titan_llama.py": (["torchtitan", "spmd_types", "tyro", "docstring_parser"], 2),
}
TARGETS = {
    "litgpt": ["litgpt_llama.py"],
    "megatron": ["megatron_gpt.py"],
    "megatron-sp": ["megatron_gpt.py", "--sequence-parallel"],
    "titan-tp-without-sp": ["titan_llama.py", "--no-sequence-parallel"],
    "titan-tp": ["titan_llama.py"],
    "titan-tp-plain-tensors": ["titan_llama.py", "--spmd", "spmd_types"],
    "titan-fsdp": ["titan_llama.py", "--parallel", "fsdp"],
}
TRAINED = {
    "litgpt": TARGETS["litgpt"],
    "megatron-sp": TARGETS["megatron-sp"],
    "titan-tp": TARGETS["titan-tp"],
    "titan-fsdp-checkpointed": [*TARGETS["titan-fsdp"], "--checkpoint", "full"],
}
FAULTY = {name: TARGETS[name] for name in ("litgpt", "megatron-sp", "titan-tp", "titan-fsdp")}
FAULTS = ["rope", "scale", "act", "eps"]


def missing(script: str) -> str:
    """Return why a script cannot run here, or nothing."""
    for name in ("transformers", *NEEDS[script][0]):
        if util.find_spec(name.partition(".")[0]) is None or util.find_spec(name) is None:
            return f"{script} needs {name}, of the extra `systems`"
    version = metadata.version("transformers")
    return "" if int(version.split(".")[0]) >= 5 else f"transformers {version} is before 5"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file that whoever comes first writes, and all others read."""
    return tmp_path_factory.mktemp("systems") / "weights.safetensors"


@pytest.fixture
def logits(shell, weights):
    """Run a system; return its logits [b, s, v]."""

    def logits(script: str, *options: str) -> torch.Tensor:
        if reason := missing(script):
            pytest.skip(reason)
        ranks = NEEDS[script][1]
        how = shell.python if ranks == 1 else shell.torchrun(ranks)
        out = shell.folder / f"{script}.safetensors"
        done = shell(how, SYSTEMS / script, "--weights", weights, "--logits", out, options)
        assert done.returncode == 0, done.stderr
        return load_file(out)["logits"]

    return logits


@pytest.fixture
def baseline(logits, weights):
    """Return the logits of transformers for these options, computed once."""

    def baseline(*options: str) -> torch.Tensor:
        kept = weights.with_name("_".join(["hf", *options]) + ".pt")
        if not kept.exists():
            torch.save(logits("hf_llama.py", *options), kept)
        return torch.load(kept)

    return baseline


def test_no_system_knows_of_taps():
    for path in SYSTEMS.glob("*.py"):
        assert "recorder" not in path.read_text() and "replayer" not in path.read_text(), path


@pytest.mark.slow
@pytest.mark.parametrize("words", TARGETS.values(), ids=TARGETS)
def test_logits_are_those_of_transformers(words, logits, baseline):
    target = logits(*words)
    assert target.dtype == torch.float64
    torch.testing.assert_close(target, baseline(), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAINED.values(), ids=TRAINED)
def test_they_train_alike(words, logits, baseline):
    trained = baseline("--train", "2")
    assert (trained - baseline()).abs().max() > 0.1
    torch.testing.assert_close(logits(*words, "--train", "2"), trained, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("words", FAULTY.values(), ids=FAULTY)
def test_a_planted_fault_is_the_same_in_each(words, fault, logits, baseline):
    faulty = baseline("--fault", fault)
    assert (faulty - baseline()).abs().max() > 0.01
    torch.testing.assert_close(logits(*words, "--fault", fault), faulty, rtol=0, atol=1e-12)


TABLES = {
    "hf_llama.py": "hf-llama",
    "litgpt_llama.py": "litgpt",
    "megatron_gpt.py": "megatron-gpt",
    "titan_llama.py": "torchtitan-llama",
}
# Each table is tried in every run of the tests, and each way to cut a system in the slow ones.
QUICK = ("litgpt", "megatron-sp", "titan-tp")
GRAFTED = {name: words for name, words in TARGETS.items() if name != "titan-tp-plain-tensors"}
FIRST = {"rope": "q_rope", "scale": "attn_ctx", "act": "mlp_act", "eps": "mlp_norm"}
"""Which tap is the first that a fault shows at, in layer 1."""


def each(names, quick=QUICK):
    """Parametrize by targets, all but a few marked slow."""
    return [
        pytest.param(TARGETS[name], id=name, marks=() if name in quick else pytest.mark.slow)
        for name in names
    ]


def started(shell, weights, words) -> list:
    """Return the words that run a system."""
    script, *options = words
    if reason := missing(script):
        pytest.skip(reason)
    ranks = NEEDS[script][1]
    how = shell.python if ranks == 1 else shell.torchrun(ranks)
    return [how, SYSTEMS / script, "--weights", weights, options]


@pytest.fixture
def recorded(shell, weights) -> Path:
    """The recording of transformers' Llama, made once."""
    run = weights.with_name("recorded")
    if not run.exists():
        job = started(shell, weights, ["hf_llama.py"])
        done = shell(shell.graft, "record", "-o", run, "--taps", "auto", "--", job)
        assert done.returncode == 0, done.stderr
        assert "taps of LlamaForCausalLM: hf-llama, 19 of 20 rows fit" in done.stderr
    return run


@pytest.mark.processes
@pytest.mark.parametrize("words", each(GRAFTED))
def test_every_row_of_the_table_is_grafted(words, recorded, shell, weights):
    table = TABLES[words[0]]
    done = shell(
        shell.graft, "replay", recorded, "-o", "out", "--taps", table, "--strict",
        "--", started(shell, weights, words),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = read_log(shell.folder / "out")
    assert set(log["outcome"]) == {"grafted"} and len(log) == 34 * NEEDS[words[0]][1]
    assert log["rel_diff"].max() < 1e-24


@pytest.mark.processes
@pytest.mark.parametrize(
    ("fault", "tap"),
    [
        pytest.param(*one, marks=() if one[0] == "scale" else pytest.mark.slow)
        for one in FIRST.items()
    ],
)
@pytest.mark.parametrize("words", each(FAULTY, ("megatron-sp",)))
def test_a_planted_fault_is_named(words, fault, tap, recorded, shell, weights):
    done = shell(
        shell.graft, "localize", recorded, "-o", "out", "--taps", TABLES[words[0]], "--json",
        "--", started(shell, weights, [*words, "--fault", fault]),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    segments = json.loads(done.stdout)["segments"]
    faults = [(one["name"], one["tags"]) for one in segments if one["fault"]]
    at = {tap, "k_rope"} if fault == "rope" else {tap}  # of one call, or of two
    assert (tap, {"layer": 1}) in faults
    assert all(name in at and tags == {"layer": 1} for name, tags in faults)


@pytest.mark.processes
def test_generate_with_a_cache_is_grafted_from_full_forwards(shell, weights):
    job = started(shell, weights, ["hf_llama.py", "--generate"])
    taps = ["--taps", "hf-llama", "--step-on", "root"]
    done = shell(shell.graft, "record", "-o", "full", taps, "--", job, "--no-cache")
    assert done.returncode == 0, done.stderr
    done = shell(
        shell.graft, "replay", "full", "-o", "out", taps, "--transform", "last_tokens.last_tokens",
        "--strict", "--", job, env={"PYTHONPATH": str(SYSTEMS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = read_log(shell.folder / "out")
    assert set(log["outcome"]) == {"grafted"} and len(log) == 34 * 6
    assert set(log["step"]) == set(range(6)) and log["rel_diff"].max() < 1e-24
