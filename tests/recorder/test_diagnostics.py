"""Call sites: the user's line, from whichever of our files it is asked for."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import recorder
from recorder import Recorder, tap
from recorder.diagnostics import call_site

ROOT = Path(recorder.__file__).parent.parent
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for package in ("recorder", "replayer")
    for path in (ROOT / package).rglob("__init__.py")
)


def asked_from(package):
    """Return a function of some package that asks for its call site."""
    namespace = {"__package__": package, "call_site": call_site}
    exec("def ask(): return call_site()", namespace)
    return namespace["ask"]


@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "replayer.demo"])
def test_no_package_of_ours_is_the_user_s(package):
    line = sys._getframe().f_lineno + 1
    assert asked_from(package)() == f"{__file__}:{line}"


def test_a_job_is_the_user_s_whatever_it_is_called():
    for package in ("replayer.demo", "recorders", "replayer_jobs", "", None):
        assert asked_from(package)() == "<string>:1", package


def test_inside_torch_it_is_the_nearest_line_of_the_user(record, tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].register_forward_hook(functools.partial(tapping, value=object()))

    def job(rank):
        job.line = sys._getframe().f_lineno + 1
        model(torch.ones(1, 2))

    tapping_from_torch = functools.partial(tap, "direct", object())
    record(job)
    err = capsys.readouterr().err
    assert f"tap 'hook' at {__file__}:{tapping.__code__.co_firstlineno + 1} is not recorded" in err

    def direct(rank):
        direct.line = sys._getframe().f_lineno + 1
        torch.utils.checkpoint.checkpoint(tapping_from_torch, use_reentrant=False)

    with Recorder(tmp_path / "other"):
        direct(0)
    assert f"tap 'direct' at {__file__}:{direct.line} is not recorded" in capsys.readouterr().err


def tapping(module, args, output, value):
    tap("hook", value)
