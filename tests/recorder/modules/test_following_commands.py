"""`--rows` of a job that runs under a command, or with variables alone."""

from __future__ import annotations

import pytest

from recorder import Recording

pytestmark = pytest.mark.processes

JOB = """
    import threading
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x, ids=None):
            return self.head(x)

    model = Model()
    def run():
        model(torch.ones(2, 2), ids=[5, 6])
        model(torch.ones(2, 2), ids=[7, 8])
    thread = threading.Thread(target=run)  # as servers do
    thread.start()
    thread.join()
    print("done")
"""
ROWS = """
    def of_call(module, args, kwargs):
        return {"n": kwargs["ids"]}
"""
TABLE = '[taps]\n"head" = { tap = "out", dims = "n h" }\n'


@pytest.fixture
def job(shell):
    shell.write("rows_of.py", ROWS)
    shell.write("t.toml", TABLE)
    return [*shell.python, shell.write("job.py", JOB)]


def ids_in(folder):
    run = Recording.open(folder)
    records = [r for r in run.rows().iter_rows(named=True) if r["kind"] == "tensor"]
    return [run.ids(r)[0].ids.tolist() if r["rows"] else None for r in records]


def test_a_function_says_which_row_is_which_in_a_thread_of_a_job(shell, job):
    how = ["--taps", "t.toml", "--rows", "rows_of.of_call"]
    done = shell(shell.graft, "record", "-o", "run", how, "--", job)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    assert ids_in(shell.folder / "run") == [[5, 6], [7, 8]]
    done = shell(shell.graft, "replay", "run", "-o", "out", "--strict", how, "--", job)
    assert done.returncode == 0, done.stderr


def test_variables_alone_will_do(shell, job):
    names = {"GRAFT_RECORD": "run", "GRAFT_RECORD_TAPS": "t.toml"}
    done = shell(job, env={**names, "GRAFT_RECORD_ROWS": "rows_of.of_call"})
    assert done.returncode == 0, done.stderr
    assert ids_in(shell.folder / "run") == [[5, 6], [7, 8]]


def test_a_function_that_is_not_there_ends_with_3_and_the_job_goes_on(shell, job):
    how = ["--taps", "t.toml", "--rows", "rows_of.of_cal"]
    done = shell(shell.graft, "record", "-o", "run", how, "--", job)
    assert done.returncode == 3 and done.stdout == "done\n"
    said = "rows 'rows_of.of_cal' cannot be imported: module rows_of has no 'of_cal'; it has"
    assert f"[graft] no row is told from another: {said}" in done.stderr
    assert "not to be trusted: " in done.stderr
    assert ids_in(shell.folder / "run") == [None, None]


def test_a_model_of_no_system_is_said_and_what_is_no_system_is_refused(shell, job):
    done = shell(shell.graft, "record", "-o", "run", "--rows", "auto", "--", job)
    assert done.returncode == 0
    assert "--rows auto: no row is told from another: the models seen are Model;" in done.stderr
    done = shell(shell.graft, "record", "-o", "other", "--rows", "auot", "--", job)
    assert done.returncode == 2
    assert "give one of auto, transformers, vllm, sglang, or a function of (module" in done.stderr
