"""A real encoder with real weights: grafts tell on which side of a planted fault a tap lies."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file
from torch import Tensor

from replayer import diff
from replayer.showing.lines import lines

pytestmark = pytest.mark.processes

JOBS = Path(__file__).parents[1] / "jobs"
GRAFT = Path(sys.executable).with_name("graft")
BASELINE = [sys.executable, JOBS / "minilm_baseline.py"]
TARGET = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    JOBS / "minilm_target.py",
]
STEPS, RANKS = 2, [0, 1]


def run(*command: object) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
    jobs_path = os.pathsep.join(filter(None, [str(JOBS), inherited.get("PYTHONPATH")]))
    done = subprocess.run(
        [str(word) for word in command],
        # One thread a rank: two ranks with a pool each would fight over the same few cores.
        env={**inherited, "PYTHONPATH": jobs_path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


def max_abs(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@dataclass(frozen=True)
class Recorded:
    run: Path
    embedding: Tensor


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("baseline")
    out = folder / "embedding.safetensors"
    run(GRAFT, "record", "-o", folder / "run", "--", *BASELINE, "--out", out)
    return Recorded(folder / "run", load_file(out)["embedding"])


@dataclass(frozen=True)
class Replayed:
    embedding: Tensor
    grafts: pl.DataFrame

    def grafts_per_rank(self) -> list[int]:
        return [self.grafts.filter(pl.col("rank") == rank).height for rank in RANKS]

    def max_abs(self) -> list[float]:
        """How far each tensor that was overwritten lay from the baseline's."""
        return self.grafts["max_abs"].to_list()


def replay_faulty_target(baseline: Recorded, folder: Path, expr: str) -> Replayed:
    out = folder / "embedding.safetensors"
    run(
        *(GRAFT, "replay", baseline.run, "-o", folder / "out", "--filter", expr),
        *("--transform", "minilm_transform.recut", "--", *TARGET, "--fault", "--out", out),
    )
    log = pl.read_parquet(folder / "out" / "grafts" / "*.parquet")
    assert log.filter(pl.col("outcome").is_in(["missing", "error"])).is_empty()
    return Replayed(load_file(out)["embedding"], log.filter(pl.col("outcome") == "grafted"))


@pytest.mark.slow
def test_without_the_fault_the_target_agrees_with_the_baseline_within_tolerance(
    baseline: Recorded, tmp_path: Path
) -> None:
    out = tmp_path / "embedding.safetensors"
    run(GRAFT, "record", "-o", tmp_path / "run", "--", *TARGET, "--out", out)
    assert max_abs(load_file(out)["embedding"], baseline.embedding) < 1e-5
    found = diff(baseline.run, tmp_path / "run")
    assert (found.status, found.compared) == (0, 76), lines(found)


def test_the_fault_shows_in_the_embedding_and_the_first_divergence_is_its_tap(
    baseline: Recorded, tmp_path: Path
) -> None:
    out = tmp_path / "embedding.safetensors"
    run(GRAFT, "record", "-o", tmp_path / "run", "--", *TARGET, "--fault", "--out", out)
    assert max_abs(load_file(out)["embedding"], baseline.embedding) > 1e-3
    found = diff(baseline.run, tmp_path / "run")
    first = "first divergence beyond tolerance: mlp_out layer=3 step=0 rank=0: "
    assert found.status == 1
    assert any(line.startswith(first) for line in lines(found)), lines(found)


@pytest.mark.slow
def test_a_graft_after_the_fault_brings_the_embedding_back(
    baseline: Recorded, tmp_path: Path
) -> None:
    replayed = replay_faulty_target(baseline, tmp_path, 'name == "mlp_out" and layer == 3')
    assert replayed.grafts_per_rank() == [STEPS] * len(RANKS)
    assert min(replayed.max_abs()) > 1e-3  # every graft replaced a faulty value
    assert max_abs(replayed.embedding, baseline.embedding) < 1e-6


@pytest.mark.slow
def test_grafts_before_the_fault_leave_the_embedding_wrong(
    baseline: Recorded, tmp_path: Path
) -> None:
    """Whole and split tensors alike: heads and MLP columns are cut for each rank by `recut`."""
    names = ("attn_q", "attn_context", "attn_out", "mlp_act")
    replayed = replay_faulty_target(baseline, tmp_path, f"name in {names} and layer == 3")
    assert replayed.grafts_per_rank() == [STEPS * len(names)] * len(RANKS)
    assert max(replayed.max_abs()) < 1e-3  # here both sides still agree, part for part
    assert max_abs(replayed.embedding, baseline.embedding) > 1e-3


def localized(baseline: Recorded, *words: str) -> dict[str, Any]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
    done = subprocess.run(
        [
            *map(str, (GRAFT, "localize", baseline.run, "--json")),
            *("--transform", "minilm_transform.recut", "--", *map(str, TARGET), *words),
        ],
        env={**inherited, "PYTHONPATH": str(JOBS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["status"] == done.returncode, done.stderr
    return found


def test_localize_names_the_fault_of_a_real_model(baseline: Recorded) -> None:
    found = localized(baseline, "--fault")
    assert found["status"] == 1 and found["not_judged"] == []
    faults = [one for one in found["segments"] if one["fault"]]
    assert {(one["name"], one["tags"]["layer"]) for one in faults} == {("mlp_out", 3)}
    assert [one["step"] for one in faults] == [0, 1] and faults[0]["rank"] == RANKS
    assert found["verdict"].startswith("fault: mlp_out layer=3 (from mlp_act layer=3), on both")


@pytest.mark.slow
def test_localize_names_nothing_in_a_clean_real_model(baseline: Recorded) -> None:
    found = localized(baseline)
    assert found["status"] == 0 and not any(one["fault"] for one in found["segments"])
