"""The modules below a root by their names, without those of wrappers; and below which a table fits.

1. `named` walks from a root and leaves out what wraps: DDP, `torch.compile`, checkpoint wrappers.
2. `bases` says below which modules most rows of a table find something. A model is often held by
   something of the job's own, and a table for a causal model is also meant for its inner part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..paths import Path

if TYPE_CHECKING:
    from torch.nn import Module

_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_WRAPPERS = (
    "torch.nn.parallel.", "torch.distributed.", "megatron.", "deepspeed.", "fairscale.",
    "accelerate.", "lightning.", "colossalai.",
)  # fmt: skip
"""Where the classes of wrappers stand that call what they wrap `module`."""
_IDENTITIES = frozenset({"IdentityOp", "IdentityFuncOp"})  # Megatron's


class Base(NamedTuple):
    """A module below which a table's paths are taken.

    Attributes:
        name: its name below the root, "" for the root itself.
        without: the first part of paths that is left out, "" for none.
        found: the positions of the paths that fit something.
    """

    name: str
    without: str
    found: frozenset[int]


def named(root: Module) -> dict[str, Module]:
    """Return the modules of a root by qualified name, the root as "", wrappers left out.

    A module that stands in several places has several names.
    """
    found: dict[str, Module] = {}

    def walk(module: Module, name: str, above: tuple[int, ...]) -> None:
        if id(module) in above:
            return  # a module that holds itself
        found[name] = module  # of a wrapper and what it wraps, the inner one
        children = {n: one for n, one in module._modules.items() if one is not None}
        for child, one in children.items():
            is_wrapped = child in _WRAPPED or (
                child == "module" and len(children) == 1 and _is_wrapper(module)
            )
            walk(one, name if is_wrapped else f"{name}.{child}".lstrip("."), (*above, id(module)))

    walk(root, "", ())
    return found


def every(root: Module) -> list[Module]:
    """Return a root and all modules below it, each once, whatever its class makes of `modules`."""
    found: dict[int, Module] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            waiting += [child for child in one._modules.values() if child is not None]
    return list(found.values())


def is_identity(module: Module) -> bool:
    """Whether a module only hands on its input: then its output is what another module made."""
    kinds = type(module).__mro__
    return any(
        (one.__name__ == "Identity" and one.__module__.startswith("torch.nn."))
        or (one.__name__ in _IDENTITIES and one.__module__.startswith("megatron."))
        for one in kinds
    )  # fmt: skip


def _is_wrapper(module: Module) -> bool:
    return any(f"{one.__module__}.".startswith(_WRAPPERS) for one in type(module).__mro__)


def bases(paths: Sequence[Path], names: Iterable[str]) -> list[Base]:
    """Return where most of the paths fit something, the outermost of equals; none where none fits.

    Several are returned where they lie side by side, as a policy and its reference do.
    """
    first = _first(paths)
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    names = list(names)
    for without in ("", first) if first else ("",):
        for number, whole in enumerate(paths):
            path = whole.without(without)
            if whole.is_anywhere or not whole.modules:
                continue
            for name in names:
                base = path.fits_below(name)
                if base is not None:
                    found[base, without].add(number)
    if not found:
        fitting = (any(path.fits(name) is not None for name in names) for path in paths)
        anywhere = {number for number, fits in enumerate(fitting) if fits}
        return [Base("", "", frozenset(anywhere))] if anywhere else []
    most = max(map(len, found.values()))
    best = sorted(
        (without != "", len(base), base, without)
        for (base, without), rows in found.items()
        if len(rows) == most
    )
    chosen: list[Base] = []
    for _, _, base, without in best:
        if not any(_is_below(base, other.name) or _is_below(other.name, base) for other in chosen):
            chosen.append(Base(base, without, frozenset(found[base, without])))
    return chosen


def below(names: Mapping[str, Module], base: str) -> dict[str, Module]:
    """Return the modules below one of them, by their names from there."""
    if not base:
        return dict(names)
    inner = {
        name[len(base) + 1 :]: one for name, one in names.items() if name.startswith(base + ".")
    }
    return {"": names[base], **inner}


def _is_below(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(other + ".")


def _first(paths: Sequence[Path]) -> str:
    """Return the part that most paths begin with, where it is one that holds the others."""
    counts: dict[str, int] = defaultdict(int)
    for path in paths:
        if "." in path.modules and path.first:
            counts[path.first] += 1
    if not counts:
        return ""
    first = max(counts, key=lambda name: counts[name])
    return first if counts[first] * 2 > len(paths) else ""
