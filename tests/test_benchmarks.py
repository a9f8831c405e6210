"""The benchmarks run and report; what they measure is for a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

RUN = Path(__file__).parent / "benchmarks" / "run.py"


@pytest.mark.slow
def test_the_benchmarks_run_and_say_what_they_found(tmp_path):
    names = [
        "inactive",
        "rejected",
        "small",
        "repeats",
        "identity",
        "layouts",
        "metrics",
        "opening",
        "localizing",
        "diff-large",
        "diff-many",
        "diff-manifests",
    ]
    words = [sys.executable, RUN, "--quick", "--dir", tmp_path, "--json", tmp_path / "found.json"]
    done = subprocess.run(
        [*map(str, words), "--only", *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["cores"] >= 1
    measures = {one["measure"] for one in found["results"]}
    for measure in ("tap, nothing active", "graft by identity, 64 MiB"):
        assert measure in measures and measure in done.stdout
    for one in found["results"]:
        assert one["ours"] > 0 and (one["peer_figure"] > 0 or not one["peer"])
        assert one["met"] in (True, False, None)
    assert not list(tmp_path.glob("graft-benchmark-*")), "they clean up behind themselves"
