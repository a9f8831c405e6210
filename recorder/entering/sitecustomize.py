"""The way in where torch loads no entry points: Python imports this at its start, by PYTHONPATH.

It hands on to the `sitecustomize` that would have been imported without it, and then waits for
torch. It must not import anything of tensorgraft before torch is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH120  # without an import of pathlib


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Enters as soon as `import torch` has ended."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = None if spec is None else spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                from tensorgraft_entry import enter  # type: ignore[import-not-found]
            except ImportError:  # another environment's Python, which has torch and not this
                return
            enter()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _hand_on() -> None:
    """Import the `sitecustomize` that this one stands before, if there is one."""
    own = sys.modules.pop("sitecustomize", None)
    path = list(sys.path)
    sys.path[:] = [one for one in path if os.path.abspath(one) != _HERE]
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        if own is not None:
            sys.modules["sitecustomize"] = own
    finally:
        sys.path[:] = [one for one in sys.path if os.path.abspath(one) != _HERE]


_hand_on()
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
    sys.meta_path.insert(0, _AfterTorch())
