"""`graft record`, `ls` and `show`, as processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recorder import Recording

JOB = """
    import sys, torch
    from recorder import tap, step
    for s in range(2):
        for i in range(3):
            tap("attn_out", torch.full((2, 4), float(i)), layer=i)
        tap("loss", 0.5)
        step()
    print("job output", sys.stdin.read())
    sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""


def test_record_keeps_stdin_stdout_and_the_exit_status(shell, run):
    job = shell.write("job.py", JOB)
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, job, "7", input="typed in")
    assert done.returncode == 7
    assert done.stdout == "job output typed in\n"
    assert "8 records from 1 rank," in done.stderr
    back = Recording.open(run)
    assert back.rows().height == 8
    assert back.meta["command"] == [*shell.python, job, "7"]
    assert back.claims()[0]["state"] == "complete"


def test_a_second_record_is_refused_before_the_command_starts(shell, run):
    job = shell.write("job.py", JOB)
    assert shell(shell.graft, "record", "-o", run, "--", shell.python, job).returncode == 0
    again = shell(shell.graft, "record", "-o", run, "--", shell.python, job)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.startswith("Error: ") and "--overwrite" in again.stderr
    words = ("record", "-o", run, "--overwrite", "--filter", "layer == 1")
    assert shell(shell.graft, words, "--", shell.python, job).returncode == 0
    assert Recording.open(run).rows().height == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["record", "--", "true"], "Missing option '-o'"),
        (["record", "-o", "RUN"], "Missing argument 'COMMAND...'"),
        (["record", "-o", "RUN", "python", "x.py", "--lr", "3"], "write -- before COMMAND"),
        (["record", "-o", "RUN", "--filter", "layer <", "--", "true"], "not a Python expression"),
        (["record", "-o", "RUN", "--max-bytes", "lots", "--", "true"], "'lots' is not a size"),
        (["record", "-o", "RUN", "--", "no-such-program"], "command not found: no-such-program"),
        (["record", "-o", "job.py", "--", "true"], "is a file; name a folder"),
        (["ls", "nowhere"], "nowhere is not a recording"),
        (["show", "nowhere"], "nowhere is not a recording"),
    ],
)
def test_wrong_usage_is_one_clear_sentence_and_status_2(shell, words, message):
    shell.write("job.py", JOB)
    done = shell(shell.graft, words)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_filter_s_error_points_at_the_place(shell):
    done = shell(shell.graft, "ls", "x", "--filter", "name.upper() == 'A'")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "Error: filter cannot be used: the only methods are startswith and endswith",
        "  name.upper() == 'A'",
        "  ^^^^^^^^^^",
    ]


def test_a_filter_that_selects_nothing_says_why(shell, run):
    job = shell.write("job.py", JOB)
    words = ("record", "-o", run, "--filter", 'name == "atn_out" and laier < 2')
    done = shell(shell.graft, words, "--", shell.python, job, input="")
    assert done.returncode == 0
    assert "no tap carried the tag 'laier', closest: layer" in done.stderr
    assert "no tap is named 'atn_out', closest: attn_out" in done.stderr


def test_a_command_without_taps_is_told_so(shell, run):
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "COMMAND made no tap" in done.stderr and "graft doctor" in done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0", "nothing was recorded: COMMAND ended with 1 before it made a tap"),
        ("tap('x', object())", "nothing was recorded: 1 tap could not be, see above"),
        ("tap('x', 1, layer=object())", "nothing was recorded: 1 tap could not be, see above"),
    ],
)
def test_no_tap_is_said_only_where_there_was_none(shell, run, code, said):
    job = f"from recorder import tap\n{code}"
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "-c", job)
    assert said in done.stderr and "made no tap" not in done.stderr


def test_a_doctor_in_the_job_s_place_is_no_job_without_taps(shell, run):
    done = shell(shell.graft, "record", "-o", run, "--", shell.graft, "doctor")
    assert done.returncode == 0 and "would record into" in done.stdout
    assert "made no tap" not in done.stderr


def test_signals_reach_the_command_and_its_end_is_told(shell, run):
    shell.write(
        "wait.py",
        """
        import signal, sys, time, torch
        from recorder import tap
        tap("x", torch.ones(3))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
        print("ready", flush=True)
        while True:  # `signal.pause` would not hear of one that came just before it
            time.sleep(0.1)
        """,
    )
    words = [*shell.graft, "record", "-o", str(run), "--", sys.executable, "wait.py"]
    with subprocess.Popen(
        words, cwd=shell.folder, env=shell.env, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 9
    assert Recording.open(run).claims()[0]["state"] == "complete"


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="nothing tells who sent a signal")
def test_a_signal_to_the_wrapper_alone_ends_the_command_of_a_terminal(shell, run):
    """What the keyboard sends comes to all of the foreground; what a process sends does not."""
    shell.write(
        "wait.py",
        """
        import time, torch
        from recorder import tap
        tap("x", torch.ones(3))
        print("ready", flush=True)
        for _ in range(600):
            time.sleep(0.1)
        """,
    )
    words = [*shell.graft, "record", "-o", str(run), "--", sys.executable, "wait.py"]
    ours, theirs = os.openpty()

    def begin():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        words, cwd=shell.folder, env=shell.env, stdin=theirs, stdout=subprocess.PIPE,
        stderr=theirs, start_new_session=True, preexec_fn=begin,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (1, 128 + signal.SIGINT)  # polars makes it 1
    os.close(ours), os.close(theirs)
    assert Recording.open(run).manifest().height == 1


def test_commands_are_found_beside_graft_though_nobody_activated_it(shell, run):
    program = Path(sys.executable).parent / "graft"
    env = {"PATH": os.defpath}
    if shutil.which("graft", path=os.defpath):
        pytest.skip("graft is installed for all")
    done = shell(shell.graft, "record", "-o", run, "--", "graft", "doctor", env=env)
    assert done.returncode == 0
    assert f"graft is not on PATH; taking the one of graft's environment, {program}" in done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("torchrum", "torchrum is neither on PATH nor in"),
        ("./train.sh", "there is no ./train.sh here; check its path"),
        ("job.py", "job.py is a script; run it as in: -- python job.py"),
    ],
)
def test_a_command_that_is_not_there_is_told_where_it_was_sought(shell, run, word, said):
    shell.write("job.py", JOB)
    done = shell(shell.graft, "record", "-o", run, "--", word)
    assert done.returncode == 2 and f"command not found: {said}" in done.stderr


def test_a_command_may_have_a_double_dash_of_its_own(shell, run):
    job = shell.write("job.py", "import sys; print(sys.argv[1:])")
    done = shell(shell.graft, "record", "-o", run, sys.executable, job, "--", "--foo")
    assert done.returncode == 0 and "--foo" in done.stdout


def test_a_killed_job_leaves_what_it_tapped(shell, run):
    shell.write(
        "killed.py",
        """
        import os, signal, time, torch
        from recorder import Recording, tap
        for i in range(20):
            tap("x", torch.full((1000,), float(i)), i=i)
        run = os.environ["GRAFT_RECORD"]
        while Recording.open(run).rows().height < 20:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "killed.py")
    assert done.returncode == 128 + signal.SIGKILL
    assert "ended without closing its recording" in done.stderr
    assert "20 records from 1 rank, 80.0 kB" in done.stderr
    back = Recording.open(run)
    assert back.rows().height == 20 and back.claims()[0]["state"] == "killed"
    assert not [p for p in run.rglob("*") if p.suffix in (".partial", ".journal")]
    assert sum(len(load_file(p)) for p in run.rglob("*.safetensors")) == 20
    assert all(back.load(0, "x", i=i)[999] == i for i in range(20))
    listed = shell(shell.graft, "ls", run)
    assert listed.returncode == 0 and "not closed on rank 0" in listed.stdout


@pytest.mark.slow
def test_one_wrapper_a_rank_shares_a_folder_and_takes_nobody_s_place(shell, run):
    job = shell.write("job.py", JOB)
    words = (shell.graft, "record", "-o", run, "--", shell.python, job)
    for rank in ("0", "1"):
        done = shell(words, env={"RANK": rank, "WORLD_SIZE": "2"}, input="")
        assert done.returncode == 0, done.stderr
    assert Recording.open(run).ranks == [0, 1]
    taken = shell(words, env={"RANK": "1", "WORLD_SIZE": "2"}, input="")
    assert taken.returncode == 2 and "rank 1" in taken.stderr and "--overwrite" in taken.stderr
    replaced = shell(
        *words[:2], "--overwrite", *words[2:], env={"RANK": "1", "WORLD_SIZE": "2"}, input=""
    )
    assert replaced.returncode == 0
    assert Recording.open(run).ranks == [0, 1]


def test_where_only_the_rank_can_know_the_job_goes_on_and_the_wrapper_ends_with_3(shell, run):
    job = shell.write("job.py", JOB)
    words = (shell.graft, "record", "-o", run, "--", shell.python, job)
    assert shell(words, env={"RANK": "0", "WORLD_SIZE": "2"}, input="").returncode == 0
    # Nothing tells this wrapper that its command will be rank 0 again.
    shell.write(
        "late.py",
        "import os\nos.environ.update(RANK='0', WORLD_SIZE='2')\nexec(open('job.py').read())",
    )
    before = sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file())
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "late.py", input="")
    assert done.returncode == 3 and done.stdout.startswith("job output")
    assert "this rank is not recorded" in done.stderr and "--overwrite" in done.stderr
    assert sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file()) == before


@pytest.mark.slow
def test_threads_that_tap_while_the_session_opens_lose_nothing(shell, run):
    shell.write(
        "threads.py",
        """
        import threading, torch
        from recorder import tap
        together = threading.Barrier(8)
        kept = []
        def worker(i):
            together.wait()
            for k in range(50):
                kept.append(tap("x", torch.full((3,), float(k)), i=i, k=k))
        threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        """,
    )
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "threads.py")
    assert done.returncode == 0 and Recording.open(run).rows().height == 400
    done = shell(shell.graft, "replay", run, "--strict", "--", shell.python, "threads.py")
    assert done.returncode == 0 and "400 grafted" in done.stderr


@pytest.mark.slow
def test_a_data_loader_s_worker_that_taps_first_does_not_take_the_rank(shell, run):
    shell.write(
        "loader.py",
        """
        import torch
        from recorder import tap
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return tap("in_worker", torch.tensor(i))
        if __name__ == "__main__":
            for how in ("fork", "spawn"):
                for batch in torch.utils.data.DataLoader(
                    Data(), num_workers=1, multiprocessing_context=how
                ):
                    tap("batch", batch, how=how)
        """,
    )
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "loader.py")
    assert done.returncode == 0, done.stderr
    assert Recording.open(run).rows()["name"].unique().to_list() == ["batch"]
    assert "is a data loader's worker; its taps are ignored" in done.stderr


def test_ranks_of_which_nothing_was_selected_were_there_all_the_same(shell, run):
    job = shell.write("job.py", JOB)
    words = ("record", "-o", run, "--filter", "rank == 0", "--", shell.python, job)
    for rank in "01":
        env = {"RANK": rank, "WORLD_SIZE": "2"}
        assert shell(shell.graft, words, env=env, input="").returncode == 0
    assert Recording.open(run).ranks == [0, 1]
    assert Recording.open(run).rows()["rank"].unique().to_list() == [0]
    done = shell(shell.graft, words, input="")  # so the recording is finished, as anyone can see
    assert done.returncode == 2 and "holds a recording already" in done.stderr


def test_what_is_ignored_outside_stays_ignored_in_the_command(shell, run):
    code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    line = (
        f"trap '' HUP; exec {' '.join(shell.graft)} record -o {run} -- {sys.executable} -c '{code}'"
    )
    assert shell("bash", "-c", line).stdout == "True\n"


def test_the_variables_alone_do_the_same_without_the_wrapper(shell, run):
    job = shell.write("job.py", JOB)
    env = {
        "GRAFT_RECORD": str(run),
        "GRAFT_RECORD_FILTER": "layer == 2",
        "GRAFT_RECORD_LEVEL": "stats",
    }
    assert shell(shell.python, job, env=env, input="").returncode == 0
    back = Recording.open(run)
    assert back.rows()["tags"].unique().to_list() == ['{"layer":2}']
    assert back.rows()["shard"].null_count() == 2


def test_a_bad_variable_is_said_and_the_job_goes_on(shell, run):
    job = shell.write("job.py", JOB)
    env = {"GRAFT_RECORD": str(run), "GRAFT_RECORD_FILTER": "layer ="}
    done = shell(shell.python, job, env=env, input="")
    assert done.returncode == 0 and done.stdout.startswith("job output")
    assert "GRAFT_RECORD asks for a session that cannot be opened" in done.stderr
    assert not run.exists()


@pytest.mark.slow
def test_multiprocessing_children_that_leave_without_atexit_close_too(shell, run):
    shell.write(
        "spawn.py",
        """
        import os, torch, torch.multiprocessing as mp
        def main(rank):
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            from recorder import tap
            tap("x", torch.full((3,), float(rank)))
        if __name__ == "__main__":
            mp.spawn(main, nprocs=2)
        """,
    )
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, "spawn.py")
    assert done.returncode == 0, done.stderr
    back = Recording.open(run)
    assert [c["state"] for c in back.claims()] == ["complete"] * 2
    assert back.load(1, "x")[0] == 1


@pytest.fixture
def some(shell, run):
    job = shell.write("job.py", JOB)
    assert (
        shell(shell.graft, "record", "-o", run, "--", shell.python, job, input="").returncode == 0
    )
    return run


def test_ls_lists_a_line_a_tap_and_json_alone(shell, some):
    listed = shell(shell.graft, "ls", some)
    assert listed.returncode == 0
    assert "1 rank, 8 records" in listed.stdout
    assert "attn_out" in listed.stdout and "layer=0-2" in listed.stdout
    taps = json.loads(shell(shell.graft, "ls", some, "--json").stdout)
    assert taps[0]["name"] == "attn_out" and taps[0]["tags"] == {"layer": [0, 1, 2]}
    assert taps[0]["records"] == 6 and taps[0]["shapes"] == [[2, 4]]
    assert [t["kind"] for t in taps] == ["tensor", "value"]


@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["show"], ["show", "--rank", "0"]])
def test_a_manifest_is_shown_without_torch_which_takes_seconds_to_import(shell, some, words):
    code = (
        "import sys; from replayer.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = shell(shell.python, "-c", code, *words, some)
    assert done.stderr.splitlines()[-1] == "0 False" and "attn_out" in done.stdout


def test_show_gives_each_record_with_statistics(shell, some):
    done = shell(shell.graft, "show", some, "--filter", "layer == 2", "--rank", "0", "--json")
    records = json.loads(done.stdout)
    assert [r["mean"] for r in records] == [2.0, 2.0]
    assert records[0]["tags"] == {"layer": 2} and records[1]["step"] == 1
    table = shell(shell.graft, "show", some, "--filter", "layer == 2").stdout
    assert "attn_out layer=2" in table and "2x4" in table


def test_ls_and_show_say_why_nothing_was_selected(shell, some):
    done = shell(shell.graft, "ls", some, "--filter", "leyer == 1", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert "no tap carried the tag 'leyer', closest: layer" in done.stderr
    done = shell(shell.graft, "show", some, "--rank", "4")
    assert "rank 4 recorded nothing; the recording has rank 0" in done.stderr


@pytest.mark.slow
def test_names_cannot_steer_the_terminal(shell, run):
    job = shell.write(
        "evil.py", 'import torch\nfrom recorder import tap\ntap("a\\x1b[2J\\nb", torch.ones(1))\n'
    )
    shell(shell.graft, "record", "-o", run, "--", shell.python, job)
    for command in ("ls", "show"):
        out = shell(shell.graft, command, run).stdout
        assert "\x1b" not in out and "a\\x1b[2J\\nb" in out


@pytest.mark.slow
def test_elastic_restart_under_the_wrapper(shell, run):
    shell.write(
        "elastic.py",
        """
        import os, torch
        from recorder import Recording, tap
        attempt, rank = (int(os.environ[v]) for v in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
        tap("x", torch.full((3,), float(attempt * 10 + rank)))
        if attempt == 0:  # fail once both have written, so that neither is stopped before
            run = os.environ["GRAFT_RECORD"]
            made = lambda: os.path.exists(f"{run}/recording.json")
            while not made() or Recording.open(run).rows().height < 2:
                pass
            raise SystemExit(1)
        """,
    )
    torchrun = shell.torchrun(2, "--max-restarts", "1")
    done = shell(shell.graft, "record", "-o", run, "--", torchrun, "elastic.py")
    assert done.returncode == 0, done.stderr
    back = Recording.open(run)
    assert back.manifest().select("rank", "attempt").rows() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [back.load(0, "x", attempt=a)[0].item() for a in (0, 1)] == [0, 10]
    assert [back.load(1, "x", attempt=a)[0].item() for a in (0, 1)] == [1, 11]


def test_a_job_that_was_held_for_as_long_as_it_may_be_ends_with_3(shell, run):
    job = shell.write(
        "job.py",
        """
        import threading
        import torch
        from recorder import step, tap
        from recorder.format import disk
        gate, real = threading.Event(), disk.write_at
        disk.write_at = lambda *args: gate.wait(60) and real(*args)
        for s in range(2):
            for i in range(12):
                tap("x", torch.full((1 << 18,), float(i)), i=i)
            step()
        gate.set()
        """,
    )
    words = ("record", "-o", run, "--staging", "8MiB", "--max-hold", "50ms")
    done = shell(shell.graft, words, "--", shell.python, job)
    assert done.returncode == 3, done.stderr
    said = (
        r"not to be trusted: \d+ taps dropped: writing held the job for longer than --max-hold 50ms"
    )
    assert re.search(said, done.stderr)
    assert "--when-full drop" not in done.stderr
    assert shell(shell.graft, "verify", run).returncode == 0
    refused = shell(shell.graft, "record", "-o", run, "--max-hold", "soon", "--", "true")
    assert refused.returncode == 2 and "write a number of seconds, or 2s" in refused.stderr
