"""The notebooks run from top to bottom, and are committed with what a run shows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS, "there are no notebooks to test"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisInterpreter(KernelSpecManager):
    """Every kernel is this interpreter, whatever kernels are installed on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name=kernel_name, language="python")


class Manager(AsyncKernelManager):
    """Starts this interpreter as the kernel; nbclient makes it, so nbclient shuts it down."""

    def __init__(self, **options: object) -> None:
        super().__init__(kernel_spec_manager=ThisInterpreter(), **options)


@pytest.mark.processes
@every_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's settings
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=Manager,
        timeout=120,
        resources={"metadata": {"path": str(work)}},
    )

    client.execute()  # raises CellExecutionError, with the cell and its traceback

    committed = nbformat.read(path, as_version=4)
    for cell, before in zip(notebook.cells, committed.cells, strict=True):
        assert kinds(cell) == kinds(before), cell.source


def kinds(cell: nbformat.NotebookNode) -> list[tuple[str, list[str]]]:
    """What a cell shows, but for the figures, which differ from machine to machine."""
    outputs = cell.get("outputs", ())
    return [(one.output_type, sorted(one.get("data", {}))) for one in outputs]


@every_notebook
def test_is_committed_with_the_outputs_of_a_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)  # the first with cell ids
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    shown = json.dumps([cell.outputs for cell in code])
    assert '"error"' not in shown
    assert not re.findall(r"/(?:tmp|home|root|Users|var|work)/[^\s\"]*", shown)


@every_notebook
def test_prose_has_no_figures_that_a_run_would_have_to_give(path: Path) -> None:
    """Numbers in the text that code computes go stale; what code is given may be named."""
    notebook = nbformat.read(path, as_version=4)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for text in prose:
        plain = re.sub(r"`[^`]*`|\$[^$]*\$|\*\*[^*]*\*\*", "", text)
        allowed = ("1", "0", "3")  # an initial value, an equal pair, a documented default
        assert not [n for n in re.findall(r"\b\d[\d.]*\b", plain) if n not in allowed], text
