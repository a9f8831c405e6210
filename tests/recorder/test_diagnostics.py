"""Call sites: the user's line, from whichever of our files it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import recorder
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
