"""Read what sglang's dumper has written: one file a tensor, `{"value": ..., "meta": ...}`.

1. `dumps_in` finds the files of a folder, and reads of each who wrote it and when; of its tensor
   nothing, since the file is mapped.
2. `read` gives one file's dump. Torch loads it without running code of it.

All that a dump says of itself stands in its meta. The file's name repeats it, and cannot be taken
apart again: a tag may hold what stands between two tags, and a name a slash.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import RecordingError
from .mesh import MOST_RANKS, Mesh, called_as_shared
from .ranks import MAX_WORLD_SIZE
from .sizes import count
from .taps.dumped import GRADIENT

_SUFFIX = ".pt"
_INFO = "_parallel_info"
_RANKS = ("pp_rank", "tp_rank", "cp_rank", "ep_rank", "etp_rank")
"""What the dumper may add to the tags, so that the names of files differ."""
_NO_TAGS = frozenset(
    {"name", "step", "rank", "dump_index", "world_rank", "world_size", "tokenizer_path"}
    | {"dims", "dims_grad", "recompute_pseudo_rank", "recompute_pseudo_size"}
)
_NO_AXES = frozenset({"vpp", "tcp", "etmp"})  # which are several axes in one, or none of ranks
_ROOM = 1 << 30  # bytes of a tensor that takes more than its file
_LONGEST = 300  # characters of somebody else's reason


class NoDump(Exception):
    """A file that is no dump, or none that can be read; the text says why."""


@dataclass(frozen=True)
class Dump:
    """What one file holds.

    Attributes:
        value: the tensor, or whatever else was dumped.
        name: what it was dumped as; of a gradient, without what the dumper puts before it.
        is_gradient: whether it is the gradient of what was dumped under that name.
        tags: its other tags, those of the context included.
        step: the step that it was dumped in.
        rank: the rank that dumped it.
        world_size: of how many.
        index: its place in the order in which that rank dumped, from 1.
        facts: what goes with it beside its tags, such as `dims`.
        mesh: where that rank stood; None where it did not say.
    """

    value: Any
    name: str
    is_gradient: bool
    tags: Mapping[str, Any]
    step: int
    rank: int
    world_size: int
    index: int
    facts: Mapping[str, Any]
    mesh: Mesh | None


@dataclass(frozen=True)
class Place:
    """Where a dump lies among all of them: its rank, its place in that rank's order, its file."""

    rank: int
    index: int
    path: str


@dataclass(frozen=True)
class Skipped:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass
class Dumps:
    """The dumps of a folder.

    Attributes:
        world_size: of the job that wrote them.
        places: the files that can be read, in order, rank by rank.
        skipped: those that cannot.
        gradients: (rank, step, name) of everything whose gradient is among them.
    """

    world_size: int = 0
    places: list[Place] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    gradients: set[tuple[int, int, str]] = field(default_factory=set)


def dumps_in(folder: Path, seen: Callable[[int], None] = lambda nbytes: None) -> Dumps:
    """Return what dumps a folder holds, in it and in folders in it; links are not followed.

    Args:
        folder: the folder.
        seen: called with the size of each file that was looked at.

    Raises:
        RecordingError: there is no such folder, it holds no dump, or those of several jobs.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise RecordingError(
            f"{folder} {what}; name the folder that DUMPER_DIR named, or one in it"
        )
    found = Dumps()
    by_place: dict[tuple[int, int], str] = {}
    first = ""
    for path in _files(folder):
        try:
            one = read(path, folder, is_mapped=True)
        except NoDump as err:
            found.skipped.append(Skipped(path, str(err)))
            continue
        finally:
            seen(size_of(folder / path))
        first = first or path
        if found.world_size not in (0, one.world_size):
            raise RecordingError(
                f"{folder} holds the dumps of several jobs: {first} is of a world of "
                f"{found.world_size}, and {path} of one of {one.world_size}; import the folder of "
                "one"
            )
        found.world_size = one.world_size
        other = by_place.setdefault((one.rank, one.index), path)
        if other != path:
            raise RecordingError(
                f"{folder} holds the dumps of several jobs, or of one whose dumper was reset: rank "
                f"{one.rank} has its dump {one.index} twice, in {other} and in {path}; import the "
                "folder of one"
            )
        if one.is_gradient:
            found.gradients.add((one.rank, one.step, one.name))
    if not by_place:
        raise RecordingError(_no_dumps(folder, found.skipped))
    found.places = [Place(*place, path) for place, path in sorted(by_place.items())]
    return found


def _no_dumps(folder: Path, skipped: list[Skipped]) -> str:
    if not skipped:
        return (
            f"{folder} holds no dump of sglang's dumper: no {_SUFFIX} file is in it; name another"
        )
    first, files = skipped[0], count(len(skipped), f"{_SUFFIX} file")
    return (
        f"{folder} holds no dump of sglang's dumper: {files} in it, of which none can be read as "
        f"one; {first.path}: {first.reason}"
    )


def _files(folder: Path) -> Iterator[str]:
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(_SUFFIX):
                yield os.path.relpath(os.path.join(path, name), folder)  # noqa: PTH118


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 where it is not there."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def read(path: str, folder: Path, *, is_mapped: bool = False) -> Dump:
    """Return the dump that a file holds, its tensors on the CPU.

    Args:
        path: the file's, from the folder.
        folder: the folder.
        is_mapped: leave what tensors hold on the disk until they are read.

    Raises:
        NoDump: it cannot be read, or is none.
    """
    held = _loaded(folder / path, is_mapped)
    meta = held.get("meta") if isinstance(held, dict) else None
    if not isinstance(meta, dict) or "value" not in held:
        raise NoDump("it holds no value with its meta, as the dumper writes from 0.5.10 on")
    name = meta.get("name")
    if not isinstance(name, str):
        raise NoDump(f"the name in its meta is {name!r:.60}, expected a text")
    world = _number(meta, "world_size", 1, MAX_WORLD_SIZE)
    value = held["value"]
    if isinstance(value, torch.Tensor):
        nbytes = value.numel() * value.element_size()
        if nbytes > max(_ROOM, size_of(folder / path)):
            raise NoDump(f"its tensor would take {nbytes} bytes, and the file holds far fewer")
    is_gradient = name.startswith(GRADIENT) and isinstance(value, torch.Tensor)
    return Dump(
        value=value,
        name=name.removeprefix(GRADIENT) if is_gradient else name,
        is_gradient=is_gradient,
        tags=_tags(meta),
        step=_number(meta, "step", 0),
        rank=_number(meta, "rank", 0, world - 1),
        world_size=world,
        index=_number(meta, "dump_index", 0),
        facts={one: meta[one] for one in ("dims", "dims_grad") if isinstance(meta.get(one), str)},
        mesh=_mesh(meta),
    )


def _loaded(path: Path, is_mapped: bool) -> Any:
    """Return what torch loads of a file; of a hostile one neither code nor more than it holds."""
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise NoDump("it is no regular file")
        with zipfile.ZipFile(path) as members:
            inside = members.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in inside) or (
            sum(one.file_size for one in inside) > about.st_size
        ):
            raise NoDump("it says to hold more than it does, as no file that torch.save wrote")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 2.14 says of a sparse tensor that it checks it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except NoDump:
        raise
    except OSError as err:
        raise NoDump(f"it cannot be read: {err.strerror or err}") from err
    except Exception as err:  # whatever a damaged file brings about in torch or zipfile
        needs = re.search(r"GLOBAL ([\w.]+)", str(err))
        if needs:
            raise NoDump(
                f"it holds a {needs[1]}, which cannot be loaded without running code; dump "
                "tensors, numbers and texts"
            ) from err
        fact = re.split(r"[.:] ", " ".join(str(err).split()), maxsplit=1)[0]
        raise NoDump(f"it is damaged: {fact:.{_LONGEST}}") from err


def _number(meta: Mapping[str, Any], name: str, least: int, most: int = (1 << 63) - 1) -> int:
    value = meta.get(name)
    if type(value) is not int or not least <= value <= most:
        expected = f"{least} to {most}" if most < 1 << 62 else f"a number from {least} on"
        raise NoDump(f"the {name} in its meta is {value!r:.60}, expected {expected}")
    return value


def _infos(meta: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name, info in meta.items():
        if isinstance(name, str) and name.endswith(_INFO) and isinstance(info, dict):
            yield info


def _tags(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    added = {one for info in _infos(meta) for one in _RANKS if one in info}
    return {
        name: value
        for name, value in meta.items()
        if name not in _NO_TAGS and name not in added and not str(name).endswith(_INFO)
    }


def _mesh(meta: Mapping[str, Any]) -> Mesh | None:
    """Return where the rank stood, by what Megatron or sglang said of it."""
    mesh: Mesh = {}
    for info in _infos(meta):
        for name, at in info.items():
            axis = str(name).removesuffix("_rank")
            size = info.get(f"{axis}_size")
            if axis in _NO_AXES or axis == name or axis in mesh:
                continue
            if type(at) is int and type(size) is int and 0 <= at < size < MOST_RANKS:
                mesh[axis] = at, size
    return called_as_shared(mesh) or None
