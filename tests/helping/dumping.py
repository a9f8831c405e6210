"""sglang's dumper, the file that its wheel brings, under its own name and without all of sglang."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

NAME = "sglang.srt.debug_utils.dumper"
# What the file takes from the rest of sglang: to serve a port, and to ask a server that runs.
_BESIDE = {
    "srt/managers/io_struct.py": "sock_recv = sock_send = wrap_as_pickle = None\n",
    "srt/runtime_context.py": "get_parallel = get_server_args = get_serving = None\n",
    "srt/utils.py": "def get_device():\n    return 'cpu'\n",
}


def real_file() -> Path | None:
    """Return the dumper's file where sglang is installed; None where it is not."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / "srt" / "debug_utils" / "dumper.py"
    return found if found.is_file() else None


FILE = real_file()
needs_sglang = pytest.mark.skipif(FILE is None, reason="sglang is not installed")
HAS_STEP = FILE is not None and "get_grad" in FILE.read_text()


def place(folder: Path) -> None:
    """Make `sglang` in a folder: the real dumper, and nothing else that would be imported.

    Beside it is a `megatron` without anything: the dumper asks for what would take seconds.
    """
    assert FILE is not None
    home = folder / "sglang" / "srt" / "debug_utils"
    home.mkdir(parents=True)
    for path in (folder / "sglang", home.parent, home.parent / "managers", folder / "megatron"):
        path.mkdir(exist_ok=True)
        (path / "__init__.py").touch()
    (home / "__init__.py").write_text(f"__path__.append({str(FILE.parent)!r})\n")
    for name, text in _BESIDE.items():
        (folder / "sglang" / name).write_text(text)


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the dumper as a program does, for as long as this is not resumed."""
    place(folder)
    monkeypatch.syspath_prepend(folder)
    for name in [one for one in sys.modules if one.partition(".")[0] in ("sglang", "megatron")]:
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module(NAME)
    for name in [one for one in sys.modules if one.partition(".")[0] in ("sglang", "megatron")]:
        del sys.modules[name]
