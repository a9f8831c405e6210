"""`graft replay` and `doctor` as processes, on real ranks: torchrun with gloo."""

from __future__ import annotations

import json
import sys

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from recorder import Recorder, Recording, step, tap
from replayer import log
from replayer.cli import main as cli
from replayer.log import read_log

# A job of any number of ranks: logical tensors cut along their last dimension, a few steps, the
# same tags several times a step. What each rank holds afterwards is saved.
JOB = """
    import sys, torch, torch.distributed as dist
    from safetensors.torch import save_file
    from recorder import tap, step
    fill, out = float(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    held = {}
    for s in range(2):
        for k in range(2):
            whole = (torch.arange(16.0).view(2, 8) + 100 * s + 1000 * k) * fill
            mine = whole.chunk(world, 1)[rank].contiguous()
            tap("x", mine, dims="b h[tp]", extras={"rank": rank})
            held[f"{s}.{k}"] = mine
        if rank == 0:
            used = tap("only_first", torch.full((3,), fill))
        step()
    save_file(held, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
"""
TRANSFORMS = """
    import torch
    def one(g):
        assert g.received_extras_list == [{"rank": r} for r in range(g.sender_world_size)]
        return torch.cat(g.received_list, 1).chunk(g.world_size, 1)[g.rank]
    def two(received_list, target):
        import os
        world = int(os.environ["WORLD_SIZE"])
        return torch.cat(received_list, 1).chunk(world, 1)[int(os.environ["RANK"])]
"""


def held(shell, name, ranks):
    parts = [load_file(shell.folder / f"{name}.{rank}") for rank in range(ranks)]
    return {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}


@pytest.fixture
def jobs(shell):
    shell.write("job.py", JOB)
    shell.write("transforms.py", TRANSFORMS)
    return shell


@pytest.mark.parametrize(
    ("senders", "receivers", "how"),
    [(4, 2, "one"), pytest.param(2, 4, "two", marks=pytest.mark.slow)],
)
def test_many_senders_many_receivers_and_back(jobs, run, senders, receivers, how):
    done = jobs(
        jobs.graft, "record", "-o", run, "--", jobs.torchrun(senders), "job.py", "1", "base"
    )
    assert done.returncode == 0, done.stderr
    out = jobs.folder / "out"
    done = jobs(
        *(jobs.graft, "replay", run, "-o", out, "--filter", 'name == "x"'),
        *("--transform", f"transforms.{how}", "--record", "True", "--strict"),
        *("--", jobs.torchrun(receivers), "job.py", "0", "target"),
    )
    assert done.returncode == 0, done.stderr
    assert f"replay: {4 * receivers} grafted" in done.stderr
    base, target = held(jobs, "base", senders), held(jobs, "target", receivers)
    assert base.keys() == target.keys() and len(base) == 4
    assert all(torch.equal(base[key], target[key]) for key in base)
    log = pl.scan_parquet(out / "grafts" / "*.parquet").collect()
    assert log["outcome"].unique().to_list() == ["grafted"]
    assert sorted(log["rank"].unique().to_list()) == list(range(receivers))
    # t2b: what the target itself had computed goes back onto the baseline.
    done = jobs(
        *(jobs.graft, "replay", out, "--filter", 'name == "x"', "--transform", "transforms.one"),
        *("--", jobs.torchrun(senders), "job.py", "1", "base"),
    )
    assert done.returncode == 0, done.stderr
    assert all(t.abs().sum() == 0 for t in held(jobs, "base", senders).values())


# What one process can show ----------------------------------------------------------------------

SINGLE = """
    import sys, torch
    from recorder import tap, step
    fill = float(sys.argv[1])
    for s in range(2):
        for layer in range(2):
            t = torch.full((2,), fill)
            tap("x", t, layer=layer)
            print(s, layer, t.tolist())
        step()
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def single(shell, run):
    shell.write("single.py", SINGLE)
    with Recorder(run):
        for s in range(2):
            for layer in range(2):
                tap("x", torch.full((2,), 10.0 * s + layer), layer=layer)
            step()
    return shell


def replayed(single, run, *options, status=0, env=None):
    job = [*single.python, "single.py", "-1", str(status)]
    return single(single.graft, "replay", run, *options, "--", job, env=env)


def test_a_replay_that_grafts_ends_with_the_command_s_status(single, run):
    done = replayed(single, run)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "1 1 [11.0, 11.0]"
    assert "replay: 4 grafted" in done.stderr
    assert replayed(single, run, status=5).returncode == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--transform", "no_such_module.fn"],
            "'no_such_module.fn' cannot be imported",
            marks=pytest.mark.slow,
        ),
        (["--transform", "transforms.bad"], "raised ValueError: no"),
        (["--filter", "layer == 7"], "nothing was grafted: no tap was selected"),
        pytest.param(
            ["--step-offset", "5"],
            "nothing was grafted: no selected tap has a record",
            marks=pytest.mark.slow,
        ),
        (["--strict", "--step-offset", "1"], "2 selected taps had no record, the first: x layer=0"),
        pytest.param(["--strict", "--match-on", "name"], "--strict", marks=pytest.mark.slow),
    ],
)
def test_a_replay_that_is_not_to_be_trusted_ends_with_3_and_the_job_goes_on(
    single, run, options, message
):
    single.write("transforms.py", "def bad(g):\n    raise ValueError('no')\n")
    if "--match-on" in options:
        with Recorder(run, overwrite=True):
            for _ in range(5):  # one more than the target taps
                tap("x", torch.ones(2))
    done = replayed(single, run, *options)
    assert done.returncode == 3, done.stderr
    assert message in done.stderr and "not to be trusted" in done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert "Traceback" not in done.stderr
    if options[0] == "--transform":
        assert replayed(single, run, *options, status=4).returncode == 4


@pytest.mark.slow
def test_on_error_and_on_missing_raise_stop_the_job(single, run):
    done = replayed(single, run, "--on-missing", "raise", "--step-offset", "1")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2
    assert "ReplayError: tap x layer=0 step=1 occurrence=0 was not grafted" in done.stderr
    done = replayed(single, run, "--on-error", "raise", "--transform", "no.such.fn")
    assert done.returncode == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["replay"], "Missing argument 'RUN'"),
        (["replay", "RUN"], "Missing argument 'COMMAND...'"),
        (["replay", "nowhere", "--", "true"], "nowhere is not a recording"),
        (["replay", "RUN", "--match-on", "", "--", "true"], "names an empty tag"),
        (["replay", "RUN", "--record", "True", "--", "true"], "give -o OUT too"),
        (["replay", "RUN", "--on-error", "stop", "--", "true"], "'stop' is not one of"),
        (
            ["replay", "RUN", "--step-offset", "x", "--", "true"],
            "--step-offset is 'x'; give a whole number",
        ),
    ],
)
def test_wrong_usage_is_status_2(single, run, words, message):
    done = single(single.graft, [run if word == "RUN" else word for word in words])
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_log_is_not_written_over_unless_told_so(single, run, tmp_path):
    out = tmp_path / "out"
    assert replayed(single, run, "-o", out).returncode == 0
    again = replayed(single, run, "-o", out)
    assert again.returncode == 2 and again.stdout == ""
    assert "holds the log of a replay already" in again.stderr and "--overwrite" in again.stderr
    assert replayed(single, run, "-o", out, "--overwrite", "--record", "True").returncode == 0
    assert replayed(single, run, "-o", out, "--overwrite", "--record", "True").returncode == 0
    assert Recording.open(out).rows().height == 4


@pytest.mark.slow
def test_overwriting_a_replay_leaves_recordings_alone(single, run, tmp_path):
    done = replayed(single, run, "-o", run, "--overwrite")
    assert done.returncode == 2 and "OUT is RUN itself" in done.stderr
    other = tmp_path / "other"
    with Recorder(other):
        tap("mine", torch.ones(1))
    assert replayed(single, run, "-o", other, "--overwrite").returncode == 0
    assert Recording.open(other).load(0, "mine").item() == 1


def test_a_killed_target_leaves_its_log(single, run, tmp_path):
    single.write(
        "single.py",
        """
        import os, signal, torch
        from recorder import tap
        for layer in range(2):
            used = tap("x", torch.zeros(2), layer=layer)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    out = tmp_path / "out"
    assert replayed(single, run, "-o", out).returncode == 137
    log = pl.scan_parquet(out / "grafts" / "*.parquet").collect()
    assert log["outcome"].to_list() == ["grafted"] * 2


def test_the_variables_alone_do_the_same_without_the_wrapper(single, run, tmp_path):
    env = {
        "GRAFT_REPLAY": str(run),
        "GRAFT_REPLAY_OUT": str(tmp_path / "out"),
        "GRAFT_REPLAY_FILTER": "layer == 1",
        "GRAFT_REPLAY_STEP_OFFSET": "1",
    }
    done = single(single.python, "single.py", "-1", "0", env=env)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1] == "0 1 [11.0, 11.0]"
    assert pl.read_parquet(tmp_path / "out" / "grafts" / "*.parquet")["outcome"].to_list() == [
        "grafted",
        "missing",
    ]


# doctor -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_says_what_a_tap_would_do_and_why(single, run, tmp_path):
    plain = single(single.graft, "doctor")
    assert plain.returncode == 0
    assert "rank       0 of 1 (from default)" in plain.stdout
    assert "a tap      would do nothing: neither GRAFT_RECORD nor GRAFT_REPLAY" in plain.stdout
    for word in ("torch", "polars", "safetensors", "device"):
        assert word in plain.stdout

    def facts(env):
        return json.loads(single(single.graft, "doctor", "--json", env=env).stdout)

    ranked = facts({"GRAFT_RECORD": str(tmp_path / "new"), "RANK": "1", "WORLD_SIZE": "4"})
    assert ranked["rank"] == {"rank": 1, "world_size": 4, "source": "RANK and WORLD_SIZE"}
    assert ranked["taps"][0]["does"] == "record" and "as rank 1 of 4" in ranked["taps"][0]["detail"]
    assert ranked["variables"] == {"GRAFT_RECORD": str(tmp_path / "new")}
    taken = facts({"GRAFT_RECORD": str(run)})["taps"][0]
    assert taken["does"] == "nothing" and "--overwrite" in taken["why"]
    replay = facts({"GRAFT_REPLAY": str(run), "GRAFT_REPLAY_FILTER": "layer == 1"})["taps"][0]
    assert replay["does"] == "replay" and "taps that match layer == 1" in replay["detail"]
    broken = facts({"GRAFT_REPLAY": str(run), "GRAFT_REPLAY_TRANSFORM": "no.such.fn"})["taps"][0]
    assert broken["does"] == "nothing" and "cannot be imported" in broken["why"]
    half = facts({"GRAFT_RECORD": "x", "GRAFT_RANK": "1"})
    assert "GRAFT_WORLD_SIZE is not" in half["rank"]["error"]


def test_doctor_in_the_job_s_place_sees_what_reaches_the_job(single, tmp_path):
    done = single(single.graft, "record", "-o", tmp_path / "new", "--", single.graft, "doctor")
    assert "would record into" in done.stdout


def test_a_replay_that_looked_at_nothing_leaves_a_log_with_its_columns(shell, tmp_path):
    with Recorder(tmp_path / "base"):
        tap("x", torch.ones(2))
    out = tmp_path / "out"
    done = shell(
        shell.graft, "replay", tmp_path / "base", "-o", out, "--", sys.executable, "-c", ""
    )
    assert done.returncode == 3
    table = pl.scan_parquet(out / "grafts" / "*.parquet").collect()
    assert table.height == 0 and table.columns == list(log.COLUMNS)
    assert read_log(out).height == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["replay", "-o", "x", "--", "python", "a.py"],
            "missing before --, as in: graft re",
        ),
        (["replay", "--", "python"], "RUN is missing before --"),
        (["localize", "--", "python", "a.py"], "as in: graft localize RUN [options] -- COMMAND"),
        (["check", "base", "b", "--", "python"], "'b' before -- is one word too many"),
        (["record", "-o", "x", "y", "--", "python"], "graft record -o RUN [options] -- COMMAND"),
        (["replay", "base", "--"], "Missing argument 'COMMAND...'"),
        (["diff", "runs"], "give two recordings; runs holds runs/one, runs/two"),
        (["diff", "runs", "runs/one"], "no recording.json; it holds these: runs/one, runs/two"),
        (["ls", "runs/onee"], "beside it there are these: runs/one"),
        (["ls", "elsewhere"], "make one with: graft record -o RUN -- COMMAND"),
    ],
)
def test_words_that_are_missing_or_in_the_wrong_place(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        with Recorder(tmp_path / "runs" / name):
            tap("x", torch.ones(2))
    done = CliRunner().invoke(cli, words, prog_name="graft")
    assert done.exit_code == 2 and said in done.output


def test_a_replay_ends_with_the_command_to_type_next(single, run, tmp_path):
    done = replayed(single, run, "-o", "out dir", "--record", "True")
    assert done.stderr.splitlines()[-1] == f"[graft] next: graft diff {run} 'out dir'"
    plain = replayed(single, run).stderr.splitlines()[-1]
    assert plain.startswith("[graft] next: the same with -o OUT --record True")
    assert "next:" not in replayed(single, run, "--filter", "layer == 7").stderr
    crashed = single(single.graft, "replay", run, "--", single.python, "-c", "1 / 0")
    assert "COMMAND ended with 1 before it made a tap" in crashed.stderr
