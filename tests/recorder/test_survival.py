"""What is tapped is there: after kill -9, full disks, errors, and the last of any step."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from recorder import Recorder, Recording, step, tap
from recorder.format import disk
from recorder.verify import Checker

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
EXTENT = pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])

LOADED = """
    import os, sys, time, torch
    from recorder import tap, step

    seed, folder = int(sys.argv[1]), sys.argv[2]
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60_000, (50,), generator=g).tolist()
    if seed % 5 == 0:
        sizes[7] = 3 << 20
    log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    i = 0
    while True:
        for n in sizes:
            value = torch.arange(i, i + n, dtype=torch.int64)
            tap("x", value, i=i)
            tap("loss", float(i), i=i)
            value.zero_()
            os.write(log, f"{i} {n} {time.time()}\\n".encode())
            i += 1
            if seed % 3:
                time.sleep(0.001)
        step()
"""


def kill_under_load(folder, seed):
    """Kill a job at a random moment; return how many taps it made, and how old the oldest lost."""
    folder.mkdir()
    script = folder / "job.py"
    script.write_text("\n".join(line[4:] for line in LOADED.split("\n")))
    options = random.Random(seed)
    env = {
        **os.environ,
        "GRAFT_RECORD": str(folder / "run"),
        "GRAFT_RECORD_STAGING": options.choice(["1MiB", "16MiB", "256MiB"]),
        "GRAFT_RECORD_FSYNC": options.choice(["off", "off", "shard", "step"]),
        "OMP_NUM_THREADS": "1",
    }
    if options.random() < 0.3:
        env["GRAFT_RECORD_KEEP_LAST"] = "1000000"  # a shard every quarter of a second
    process = subprocess.Popen([sys.executable, script, str(seed), folder], env=env)
    log = folder / "log"
    try:
        while not log.exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(options.uniform(0, 2.5))
    finally:  # the job never ends by itself
        process.send_signal(signal.SIGKILL)
        killed = time.time()
        process.wait()
    taps = [line.split() for line in log.read_text().split("\n")[:-1]]
    back = Recording.open(folder / "run") if (folder / "run/recording.json").exists() else None
    rows = [] if back is None else list(back.rows().iter_rows(named=True))
    have = {json.loads(row["tags"])["i"] for row in rows if row["name"] == "x"}
    values = {json.loads(row["tags"])["i"]: row for row in rows if row["name"] == "loss"}
    oldest = 0.0
    for i, n, at in ((int(i), int(n), float(at)) for i, n, at in taps):
        if i in have:
            expected = torch.arange(i, i + n, dtype=torch.int64)
            step = i // 50
            assert torch.equal(back.load(rank=0, name="x", step=step, i=i), expected)
        else:
            oldest = max(oldest, killed - at)
        if i in values:
            assert float(values[i]["value"]) == i
    return len(taps), oldest


@pytest.mark.processes
@EXTENT
def test_a_killed_job_loses_nothing_older_than_a_second(tmp_path, extent):
    lost = []
    seeds = range(300) if extent == "long" else [random.randrange(1 << 30) for _ in range(4)]
    for seed in seeds:
        print("seed", seed)
        taps, oldest = kill_under_load(tmp_path / str(seed), seed)
        lost.append(oldest)
        assert oldest < 1.0, f"seed {seed}: a tap of {oldest:.2f} s before is lost, of {taps}"
        subprocess.run(["rm", "-rf", tmp_path / str(seed)], check=True)
    print(f"{len(lost)} kills, the oldest tap lost was {max(lost):.3f} s old")


class Stop(BaseException):
    """The process ends here."""


class Steps:
    """The `os` that `disk` sees: counts changes, and at one of them does what it is told.

    Args:
        at: the number of the change, from 0.
        what: `stop` before it, `tear` it in the middle and stop, or an errno to fail with.
        forever: whether all later ones fail too.
    """

    CHANGES = ("open", "mkdir", "write", "pwritev", "ftruncate", "fsync", "replace", "unlink")
    CHANGES += ("link",)

    def __init__(self, at, what, forever=False):
        self.at, self.what, self.forever = at, what, forever
        self.count = 0
        self.stopped = False
        self.names = []
        self._lock = threading.Lock()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def change(*args, **kwargs):
            with self._lock:
                if name == "open" and not args[1] & os.O_CREAT:
                    return real(*args, **kwargs)
                number, self.count = self.count, self.count + 1
                self.names.append(name)
                hit = number == self.at or (number > self.at and self.forever)
                if self.stopped:
                    raise Stop
                if not hit:
                    return real(*args, **kwargs)
                if isinstance(self.what, int):
                    if name in ("unlink", "ftruncate"):  # they free space
                        return real(*args, **kwargs)
                    raise OSError(self.what, os.strerror(self.what))
                self.stopped = True
                if self.what == "tear" and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.what == "tear" and name == "pwritev":
                    data = b"".join(args[1])
                    real(args[0], [data[: len(data) // 2]], args[2])
                raise Stop

        return change


def small_job(run, **options):
    """Record a little in every way there is."""
    recorder = Recorder(run, staging="1MiB", **options)
    made = {}
    with recorder:
        for s in range(4):
            for i in range(3):
                value = torch.full((50,), 10.0 * s + i)
                tap("x", value, i=i)
                made[s, i] = value.clone()
            tap("same", torch.ones(20))
            tap("big", torch.full((100_000,), float(s)))
            tap("loss", s)
            step()
            time.sleep(0.08)
    return recorder, made


def check_whole_or_missing(run, made):
    """Every record there is reads back as it was tapped; return the steps of `x`."""
    try:
        back = Recording.open(run)
    except Exception:
        assert not (run / "recording.json").exists() or not list(run.glob("rank-*/a*"))
        return []
    steps = []
    for row in back.rows().iter_rows(named=True):
        if row["kind"] == "value":
            assert json.loads(row["value"]) == row["step"]
            continue
        got = back.read(row)
        if row["name"] == "x":
            i = json.loads(row["tags"])["i"]
            assert torch.equal(got, made[row["step"], i])
            steps.append(row["step"])
        elif row["name"] == "big":
            assert torch.equal(got, torch.full((100_000,), float(row["step"])))
        else:
            assert torch.equal(got, torch.ones(20))
    return steps


ALL = {f"{s},{i}": torch.full((50,), 10.0 * s + i) for s in range(4) for i in range(3)}
MADE = {tuple(map(int, key.split(","))): value for key, value in ALL.items()}
OPTIONS = [{}, {"fsync": "step"}, {"keep_last": 1}]


def count_changes(run, monkeypatch, options):
    steps = Steps(-1, "stop")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", steps)
        small_job(run, **options)
    return steps.count


@pytest.mark.thorough
@EXTENT
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("what", ["stop", "tear"])
def test_after_a_stop_at_any_single_change_the_rest_is_whole(
    tmp_path, monkeypatch, options, what, extent
):
    total = count_changes(tmp_path / "all", monkeypatch, options)
    assert total > 20
    points = (
        range(total) if extent == "long" else sorted(random.sample(range(total), min(total, 6)))
    )
    for at in points:
        run = tmp_path / f"{what}{at}"
        steps = Steps(at, what)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", steps)
            try:
                small_job(run, **options)
            except Stop:
                pass
        check_whole_or_missing(run, MADE)
        if (run / "recording.json").exists():
            for rank in Checker(run).ranks():
                assert not rank.damaged, (at, rank.problems)


@pytest.mark.thorough
@EXTENT
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("forever", [False, True])
def test_an_error_at_any_single_change_ends_the_recording_in_good_order(
    tmp_path, monkeypatch, capsys, number, forever, extent
):
    total = count_changes(tmp_path / "all", monkeypatch, {})
    points = (
        range(total) if extent == "long" else sorted(random.sample(range(total), min(total, 3)))
    )
    for at in points:
        run = tmp_path / f"at{at}"
        steps = Steps(at, number, forever)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", steps)
            recorder, _ = small_job(run)  # the job never notices
        err = capsys.readouterr().err
        check_whole_or_missing(run, MADE)
        # A claim or the last note can be made in another way; anything else must be said.
        if recorder.state != "complete":
            assert os.strerror(number) in recorder.reason, (at, steps.names[at])
            assert os.strerror(number) in err
        else:
            assert not forever or at >= steps.count - 2, (at, steps.names[-5:], err)
            assert len(check_whole_or_missing(run, MADE)) == 12


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk(shell, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        job = shell.write(
            "job.py",
            """
            import torch, sys
            from recorder import tap
            for i in range(200):
                tap("x", torch.full((30_000,), float(i)), i=i)
            print("the job went on")
            """,
        )
        run = small / "run"
        done = shell(shell.graft, "record", "-o", run, "--", shell.python, job)
        assert (done.returncode, done.stdout) == (3, "the job went on\n")
        assert "No space left on device" in done.stderr
        meta = json.loads((run / "recording.json").read_text())
        assert [one["state"] for one in meta["ended"]] == ["failed"]
        assert "No space left on device" in meta["ended"][0]["reason"]
        back = Recording.open(run)
        assert 20 < back.rows().height < 40
        for i in range(back.rows().height):
            assert torch.equal(back.load(rank=0, name="x", i=i), torch.full((30_000,), float(i)))
        listed = shell(shell.graft, "ls", run).stdout
        assert "incomplete from step 0 on: rank 0 failed" in listed
        assert shell(shell.graft, "verify", run).returncode == 0
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_min_free_stops_in_good_order(shell, run, monkeypatch):
    free = [100 << 20]
    monkeypatch.setattr(disk, "free_bytes", lambda path: free[0])
    with Recorder(run, min_free="50MiB") as recorder:
        for i in range(10):
            tap("x", torch.full((1 << 18,), float(i)), i=i)
            while recorder.state == "running" and recorder.progress().waiting:
                time.sleep(0.01)
            free[0] -= 10 << 20
    assert recorder.state == "stopped" and "--min-free was reached" in recorder.reason
    back = Recording.open(run)
    assert 3 <= back.rows().height <= 6
    assert back.meta["ended"][0]["reason"] == recorder.reason
    job = shell.write("job.py", "import torch\nfrom recorder import tap\ntap('x', torch.ones(9))")
    other = run.with_name("other")
    done = shell(shell.graft, "record", "-o", other, "--min-free", "900TB", "--", shell.python, job)
    assert done.returncode == 0 and "--min-free was reached" in done.stderr


def test_keep_last_keeps_the_last_steps(run):
    with Recorder(run, keep_last=3):
        for s in range(40):
            for i in range(2):
                tap("x", torch.full((300_000,), float(s)), i=i)
            tap("loss", s)
            step()
    back = Recording.open(run)
    assert sorted(set(back.rows()["step"].to_list())) == [37, 38, 39]
    for s in (37, 38, 39):
        assert torch.equal(back.load(0, "x", step=s, i=1), torch.full((300_000,), float(s)))
        assert back.value(0, "loss", step=s) == s
    on_disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert on_disk < 12 * 1_200_000 + (1 << 20)  # of 40 steps, each with one distinct payload
    assert all(not rank.problems for rank in Checker(run).ranks())


def test_keep_last_holds_the_steps_before_an_exception(shell, run):
    job = shell.write(
        "job.py",
        """
        import torch, time
        from recorder import tap, step
        for s in range(12):
            tap("x", torch.full((100,), float(s)))
            time.sleep(0.06)
            if s == 10:
                raise ValueError("the job's own")
            step()
        """,
    )
    done = shell(shell.graft, "record", "-o", run, "--keep-last", "4", "--", shell.python, job)
    assert done.returncode == 1 and "the job's own" in done.stderr
    assert Recording.open(run).rows()["step"].to_list() == [6, 7, 8, 9, 10]


@pytest.mark.slow
def test_one_rank_dead_and_the_others_alive(shell, run):
    job = shell.write(
        "job.py",
        """
        import os, signal, time, torch
        from recorder import tap, step
        rank = int(os.environ["RANK"])
        for s in range(6):
            tap("x", torch.full((10,), float(s)))
            step()
            time.sleep(0.4 if rank == 1 else 0)
            if rank == 1 and s == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "3", "GRAFT_JOB": "j", "GRAFT_RECORD": str(run)}
        subprocess.run([*shell.python, job], env={**shell.env, **env}, cwd=shell.folder)
    back = Recording.open(run)
    found = {one.rank: (one.state, one.step) for one in back.incomplete()}
    assert found == {1: ("running", 2), 2: ("missing", 0)}
    listed = shell(shell.graft, "ls", run).stdout
    assert "incomplete from step 2 on: rank 1 has not closed" in listed
    assert "its records end in step 2, those of others in step 5" in listed
    assert "incomplete from step 0 on: rank 2 has no folder here" in listed


def test_folders_of_one_job_open_together_and_others_do_not(run, tmp_path, monkeypatch):
    def record(folder, rank, job, at_ns):
        monkeypatch.setenv("GRAFT_JOB", job)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda: at_ns)  # clocks differ
            with Recorder(folder, rank=rank, world_size=2):
                tap("x", torch.full((3,), float(rank)))
        monkeypatch.delenv("GRAFT_JOB")
        return folder / f"rank-{rank:05d}"

    record(run, 0, "one", 2_000_000_000)
    theirs = record(tmp_path / "there", 1, "one", 1_000_000_000)
    theirs.rename(run / theirs.name)
    back = Recording.open(run)
    assert back.ranks == [0, 1] and not back.incomplete()
    assert torch.equal(back.load(rank=1, name="x"), torch.full((3,), 1.0))

    alien = record(tmp_path / "alien", 1, "two", 3_000_000_000)
    (run / "rank-00001").rename(tmp_path / "kept")
    alien.rename(run / alien.name)
    with pytest.raises(Exception, match="part of another recording") as caught:
        Recording.open(run)
    assert type(caught.value).__name__ == "MixedRecordings"


def test_a_claim_of_another_rank_or_version_is_refused(record):
    back = record(lambda rank: tap("x", torch.ones(3)), 2)
    path = back.path / "rank-00001" / "attempt-0.json"
    claim = json.loads(path.read_text())
    for change, said in (
        ({"format_version": 9}, "has format version 9, expected 1"),
        ({"rank": 0}, "it is of rank 0, its folder of 1"),
    ):
        path.write_text(json.dumps({**claim, **change}))
        with pytest.raises(Exception, match=said):
            Recording.open(back.path)


@pytest.mark.parametrize(
    ("access", "file", "folder"),
    [("private", 0o600, 0o700), ("group", 0o640, 0o750), ("all", 0o644, 0o755)],
)
def test_files_are_private_unless_told_otherwise(shell, run, access, file, folder):
    job = shell.write("job.py", "import torch\nfrom recorder import tap\ntap('x', torch.ones(9))")
    options = [] if access == "private" else ["--access", access]
    old = os.umask(0o000 if access == "private" else 0o077)
    try:
        done = shell(shell.graft, "record", "-o", run, *options, "--", shell.python, job)
    finally:
        os.umask(old)
    assert done.returncode == 0
    for path in [run, *run.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path
    assert Path(run).is_dir()
