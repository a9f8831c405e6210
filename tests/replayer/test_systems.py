"""One tiny Llama in four systems, as their users run them: they compute the same."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.mark.processes
@pytest.mark.parametrize("words", TARGETS.values(), ids=TARGETS)
def test_logits_are_those_of_transformers(words, logits, baseline):
    target = logits(*words)
    assert target.dtype == torch.float64
    torch.testing.assert_close(target, baseline(), rtol=0, atol=1e-12)


@pytest.mark.processes
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
