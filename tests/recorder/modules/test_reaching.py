"""How taps without edits get into programs: launchers, workers, and what cannot be reached."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from recorder import Recording
from recorder.commands import processes

JOBS = Path(__file__).parents[2] / "jobs"
pytestmark = pytest.mark.processes


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


SMALL = """
    import time
    import torch
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    for _ in range(2):
        model(torch.ones(2, 4))
    time.sleep({seconds})
"""


def record(shell, *options, run="run"):
    return [*shell.graft, "record", "-o", run, *options, "--"]


def taps_of(folder):
    rows = Recording.open(folder).manifest().sort("rank", "seq")
    return set(rows.select("rank", "name", "step", "kind").iter_rows())


@pytest.mark.parametrize("way", ["script", "isolated", slow("module"), slow("code")])
def test_plain_python(shell, way):
    shell.write("job.py", SMALL.format(seconds=0))
    words = {
        "script": ["job.py"],
        "module": ["-m", "job"],
        "isolated": ["-I", "job.py"],
        "code": ["-c", (shell.folder / "job.py").read_text()],
    }[way]
    done = shell(record(shell, "--modules", "0", "--step-on", "root"), sys.executable, words)
    assert done.returncode == 0, done.stderr
    assert taps_of(shell.folder / "run") == {(0, "0", 0, "tensor"), (0, "0", 1, "tensor")}


@pytest.mark.parametrize("how", ["fsdp", slow("ddp")])
def test_two_ranks_under_wrappers(shell, how):
    """The same taps, by the same names, and a program that computes what it did."""
    options = (
        "--modules",
        "layers.{layer}.up",
        "--modules",
        "head",
        "--modules",
        "head:grad_output",
    )
    job = [shell.torchrun(2), JOBS / "wrapped.py", how]
    plain = shell(job)
    done = shell(record(shell, *options, "--step-on", "optimizer"), job)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall("[0-9.]{8}", done.stdout)) == sorted(
        re.findall("[0-9.]{8}", plain.stdout)
    )
    run = Recording.open(shell.folder / "run")
    rows = run.manifest()
    assert set(rows["name"]) == {"layers.up", "head"} and run.ranks == [0, 1]
    assert set(rows["step"]) == {0, 1} and set(rows["kind"]) == {"tensor", "grad"}
    assert set(rows["occurrence"]) == {0}
    again = rows.filter(rows["tags"].str.contains("recompute"))
    assert len(again) == (12 if how == "fsdp" else 0)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_of_multiprocessing(shell, method):
    shell.write(
        "job.py",
        f"""
        import os
        import torch
        import torch.multiprocessing as mp

        def work(rank):
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            torch.nn.Sequential(torch.nn.Linear(4, 4))(torch.ones(2, 4))

        if __name__ == "__main__":
            mp.start_processes(work, nprocs=2, start_method={method!r})
        """,
    )
    done = shell(record(shell, "--modules", "0"), sys.executable, "job.py")
    assert done.returncode == 0, done.stderr
    assert taps_of(shell.folder / "run") == {(0, "0", 0, "tensor"), (1, "0", 0, "tensor")}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.parametrize("late", [slow(False), True])
def test_ray_actors(shell, late):
    """Under the wrapper, and where an actor gets the environment when it runs already."""
    given = {
        "GRAFT_RECORD": str(shell.folder / "run"),
        "GRAFT_RECORD_MODULES": "0",
        "GRAFT_RECORD_STEP_ON": "root",
    }
    job = [sys.executable, JOBS / "ray_actors.py", json.dumps(given if late else {})]
    wrapper = [] if late else record(shell, "--modules", "0", "--step-on", "root")
    done = shell(wrapper, job)
    assert done.returncode == 0 and done.stdout.split() == ["2"], done.stderr
    assert taps_of(shell.folder / "run") == {
        (rank, "0", step, "tensor") for rank in (0, 1) for step in (0, 1)
    }


def test_where_torch_loads_no_entry_points_it_goes_in_by_the_path(shell):
    shell.write("job.py", SMALL.format(seconds=0))
    shell.write("sitecustomize.py", "import sys; sys.chained = True")
    shell.write("main.py", "import sys; assert sys.chained; import job")
    done = shell(
        record(shell, "--modules", "0"), sys.executable, "main.py",
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(taps_of(shell.folder / "run")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other processes are seen by /proc")
def test_a_process_that_cannot_be_reached_is_named(shell):
    shell.write("job.py", SMALL.format(seconds=1))
    done = shell(
        record(shell, "--modules", "0"), sys.executable, "-I", "job.py",
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert "1 process of the command never loaded tensorgraft" in done.stderr
    assert (
        "-I job.py" in done.stderr and "nothing was recorded: no module was tapped" in done.stderr
    )


def test_a_process_that_has_just_ended_keeps_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "17"
    folder.mkdir()
    (folder / "cmdline").write_bytes(b"python\0job.py\0")
    (folder / "maps").write_bytes(b"... /libtorch.so")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    seen = processes.Processes()
    seen.look(17)
    (folder / "cmdline").write_bytes(b"")
    seen.look(17)
    assert seen.without(()) == ["pid 17: python job.py"]


def test_a_program_without_torch_is_said_to_have_loaded_nothing(shell):
    done = shell(record(shell, "--modules", "0"), sys.executable, "-c", "pass")
    assert "1 process of the command never loaded tensorgraft" in done.stderr


def test_nothing_is_loaded_where_nobody_records(shell):
    done = shell(
        sys.executable, "-c", "import torch, sys; print('recorder.modules' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("asked", [False, True])
def test_a_job_s_own_recorder_py_keeps_nobody_from_importing_torch(shell, asked):
    shell.write("recorder.py", "OWN = True")
    env = {"GRAFT_RECORD": "run", "GRAFT_RECORD_MODULES": "0"} if asked else {}
    done = shell(sys.executable, "-c", "import torch, recorder; print(recorder.OWN)", env=env)
    assert done.stdout == "True\n", done.stderr
    assert ("stands before tensorgraft's package" in done.stderr) is asked


def test_a_table_that_cannot_be_read_is_refused_before_the_program_runs(shell):
    shell.write("t.toml", '[taps]\n"a..b" = "x"\n')
    done = shell(record(shell, "--taps", "t.toml"), sys.executable, "-c", "print('ran')")
    assert done.returncode == 2 and done.stdout == ""
    assert "t.toml:2:1: the path 'a..b' cannot be read" in done.stderr
    assert not (shell.folder / "run").exists()


def test_a_table_is_found_from_the_ranks_own_folder(shell):
    shell.write("t.toml", '[taps]\n"0" = "first"\n')
    shell.write("job.py", SMALL.format(seconds=0))
    shell.write("main.py", "import os; os.chdir('/'); import job")
    done = shell(record(shell, "--taps", "t.toml"), sys.executable, "main.py")
    assert done.returncode == 0, done.stderr
    assert taps_of(shell.folder / "run") == {(0, "first", 0, "tensor")}


def test_a_replay_taps_by_a_table_of_its_own(shell):
    shell.write("job.py", SMALL.format(seconds=0))
    shell.write("a.toml", '[one.taps]\n"0" = "h"\n')
    shell.write("b.toml", '[taps]\n"1:input" = "h"\n')
    shell(record(shell, "--taps", "a.toml:one", "--step-on", "root"), sys.executable, "job.py")
    done = shell(
        shell.graft, "replay", "run", "--taps", "b.toml", "--step-on", "root", "--strict",
        "--", sys.executable, "job.py",
    )  # fmt: skip
    assert done.returncode == 0 and "replay: 2 grafted" in done.stderr, done.stderr


def test_taps_lists_what_could_be_tapped(shell):
    shell.write("job.py", SMALL.format(seconds=0))
    shell.write("t.toml", '[taps]\n"0" = "first"\n"2" = "third"\n')
    done = shell(shell.graft, "taps", "--taps", "t.toml", "--", sys.executable, "job.py")
    assert done.returncode == 0
    assert "Sequential: 3 modules called" in done.stdout
    assert any(
        line.split() == ["0", "Linear", "2", "float32", "2x4", "first"]
        for line in done.stdout.splitlines()
    )
    assert "t.toml:3: '2' fits no module" in done.stderr
    as_json = shell(shell.graft, "taps", "--json", "--", sys.executable, "-c",
                    (shell.folder / "job.py").read_text() + "\nprint('noise')")  # fmt: skip
    (root, linear, relu) = json.loads(as_json.stdout)
    assert (root["name"], linear["name"], relu["class"]) == ("", "0", "ReLU")
    assert linear["output"] == [{"place": "output", "dtype": "float32", "shape": [2, 4]}]


def test_taps_of_a_program_without_a_model_ends_with_one(shell):
    done = shell(shell.graft, "taps", "--", sys.executable, "-c", "import torch")
    assert done.returncode == 1 and "no model was called" in done.stderr
