"""`graft demo`: what it prints, what it proves, and the model it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from replayer.demo.model import HEADS, LAYERS, Model, batch
from replayer.demo.run import restored, verdict

GRAFT = Path(sys.executable).with_name("graft")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one run of the demo, as a user runs it."""
    base = tmp_path_factory.mktemp("demo")
    folder = base / "out"
    (base / "bare").mkdir()
    (base / "bare" / "numpy.py").write_text("raise ModuleNotFoundError('numpy')")
    done = subprocess.run(
        [GRAFT, "demo", "-o", folder],
        env={**os.environ, "PYTHONPATH": str(base / "bare")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NumPy" not in done.stderr  # the story alone, where there is no numpy
    return folder, done.stdout


def test_prints_every_command_it_runs(demo: tuple[Path, str]) -> None:
    folder, output = demo
    pasted = output.replace(" \\\n    ", " ").splitlines()
    baseline = "-- torchrun --standalone --nproc-per-node 4 -m replayer.demo.baseline"
    target = "-- torchrun --standalone --nproc-per-node 2 -m replayer.demo.target"
    assert [line for line in pasted if line.startswith("$ graft")] == [
        f"$ graft record -o {folder}/baseline {baseline}",
        f"$ graft record -o {folder}/target {target}",
        f"$ graft replay {folder}/baseline -o {folder}/grafted"
        f" --filter 'name == \"attn_q\" and layer == 2' --record True {target}",
        f"$ graft diff {folder}/baseline {folder}/target {folder}/grafted",
        f"$ graft localize {folder}/baseline --limit 3 {target}",
    ]


def test_the_fault_is_named_at_the_end(demo: tuple[Path, str]) -> None:
    _, output = demo
    named = output.split("$ graft localize")[1]
    assert (
        "fault: attn_q layer=2 (from hidden layer=1), on both ranks, in every step: the target's "
        "values are 4.000 x the baseline's" in named
    )
    assert "(status 1: a fault is named)" in named


def test_shows_every_tap_and_passes(demo: tuple[Path, str]) -> None:
    _, output = demo
    for name in ("attn_q", "attn_out", "mlp_hidden", "mlp_out", "hidden", "logits"):
        assert name in output
    assert "PASS: after the graft equal to the baseline's within 1e-05" in output
    assert max(len(line) for line in output.splitlines() if line.endswith("<- grafted")) <= 80


def test_taps_are_wrong_before_and_right_after_but_for_the_grafted_one(demo):
    _, output = demo
    printed = output.split("$ graft diff")[1]
    assert "what is wrong lies between hidden layer=1 and attn_q layer=2\n" in printed
    grafted, *later = printed.split("\n\n")[1].splitlines()[1:12]  # of the first step
    assert grafted.split()[:2] == ["attn_q", "layer=2"] and grafted.endswith("<- grafted")
    assert grafted.count("differs 5.29e-01") == 2
    for line in later:
        words = line.split()
        assert words.index("differs") < words.index("close") and len(line) <= 80
    assert later[-1].startswith("logits")


@pytest.mark.processes
def test_a_failing_command_ends_the_demo_with_its_status(tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("not a folder")
    code = (
        "import sys; from pathlib import Path; from replayer.demo.run import run_demo; "
        "sys.exit(run_demo(Path(sys.argv[1]), print))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, occupied], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"that command ended with status {done.returncode}" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_hold_the_same_logical_weights(world_size: int) -> None:
    whole = Model(0, 1)
    parts = [Model(rank, world_size) for rank in range(world_size)]
    for i in range(LAYERS):
        for name, dim in {"query": 1, "attn_out": 0, "mlp_in": 1, "mlp_out": 0}.items():
            joined = torch.cat([getattr(part.layers[i], name) for part in parts], dim=dim)
            torch.testing.assert_close(joined, getattr(whole.layers[i], name), rtol=0, atol=0)


def test_the_heads_must_divide_by_the_ranks() -> None:
    with pytest.raises(ValueError, match=f"{HEADS} heads cannot be cut over 3 ranks"):
        Model(0, 3)


def test_no_token_sees_what_follows_it() -> None:
    model, tokens = Model(0, 1), batch(0)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 2
    torch.testing.assert_close(model.forward(changed)[:, :-1], model.forward(tokens)[:, :-1])


def test_the_fault_changes_the_output() -> None:
    right, wrong = Model(0, 1).forward(batch(0)), Model(0, 1, unscaled_layer=2).forward(batch(0))
    assert not torch.allclose(right, wrong, atol=0.1)


def test_nan_is_never_a_restored_output() -> None:
    nan = float("nan")
    assert restored(before=1.0, after=1e-6)
    assert not restored(before=nan, after=1e-6)
    assert not restored(before=1.0, after=nan)
    assert verdict(1.0, nan).splitlines()[-1].startswith("FAIL")
