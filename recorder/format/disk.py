"""Every change that is made to a recording's folder, and nothing else.

In one place, so that tests can let any of these steps fail, or be the last that a process took.
Files are created private to the user unless an `Access` says otherwise: recordings can hold prompts
and weights.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 4096  # bytes: what fits the blocks of a file needs no room on a full disk


@dataclass(frozen=True)
class Access:
    """Who may read what is created.

    Attributes:
        file: a file's mode.
        folder: a folder's mode.
    """

    file: int
    folder: int


ACCESS = {
    "private": Access(0o600, 0o700),
    "group": Access(0o640, 0o750),
    "all": Access(0o644, 0o755),
}
PRIVATE = ACCESS["private"]


def access_of(folder: Path) -> Access:
    """Return the access that a folder was made with.

    Raises:
        OSError: there is no such folder.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    return next((access for access in ACCESS.values() if access.folder == mode), PRIVATE)


def make_folder(path: Path, access: Access = PRIVATE) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        OSError: it cannot be made, or is no folder.
    """
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_folder(path.parent, access)
    try:
        os.mkdir(path, access.folder)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        if access != PRIVATE:
            os.chmod(path, access.folder)  # asked for by name: whatever the umask says


def create(path: Path, access: Access = PRIVATE, *, append: bool = False) -> int:
    """Create a file and return its descriptor.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | (os.O_APPEND if append else 0)
    file = os.open(path, flags, access.file)
    if access != PRIVATE:
        os.fchmod(file, access.file)
    return file


def reopen(path: Path) -> int:
    """Open a file to write on where a process that is gone has left off."""
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)


def append(file: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the end of a file."""
    left = memoryview(data)
    while left.nbytes:
        left = left[os.write(file, left) :]


def write_at(file: int, offset: int, parts: Sequence[memoryview]) -> None:
    """Write all of some parts, one behind the other, from an absolute offset on."""
    left = sum(part.nbytes for part in parts)
    while left:
        done = os.pwritev(file, parts, offset)
        left -= done
        if left:  # rare: the disk is full, or a signal came
            offset += done
            parts = [memoryview(b"".join(parts))[done:]]


def truncate(file: int, size: int) -> None:
    """Set a file's size; what it gains is a hole."""
    os.ftruncate(file, size)


def sync(file: int) -> None:
    """Return when a file's bytes are on the device, as far as the system knows."""
    os.fsync(file)


def sync_folder(path: Path) -> None:
    """Return when a folder's names are on the device, as far as the system knows."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def rename(old: Path, new: Path) -> None:
    """Give a file another name, in one step."""
    os.replace(old, new)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(folder: Path) -> None:
    """Remove a folder so that nobody ever sees half of it."""
    aside = folder.with_name(f".removed-{uuid.uuid4().hex}")
    try:
        os.replace(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def replace(
    path: Path, data: bytes | memoryview, access: Access = PRIVATE, *, durable: bool = False
) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of one.

    Args:
        path: the file.
        data: all that it shall hold.
        access: who may read it.
        durable: whether to return only when it is on the device.
    """
    temporary = _written(path, data, access, durable)
    try:
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def create_whole(path: Path, data: bytes, access: Access = PRIVATE) -> bool:
    """Write a file unless there is one, in one step; return whether this call made it."""
    temporary = _written(path, data, access)
    try:
        try:
            os.link(temporary, path)  # fails where the name is taken, never seen half-written
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links: exclusive creation is atomic too, if not content.
            try:
                file = create(path, access)
            except FileExistsError:
                return False
            try:
                append(file, data)
            finally:
                os.close(file)
    finally:
        remove(temporary)
    return True


def rewrite(path: Path, data: bytes, access: Access = PRIVATE) -> None:
    """Replace a small text; where there is no room for a second file, in its place.

    Raises:
        OSError: neither can be done.
    """
    try:
        replace(path, data, access)
    except OSError:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            size = os.fstat(file).st_size
            if len(data) > -(-size // _BLOCK) * _BLOCK:
                raise
            # Within the blocks that it has; what is left of the old text becomes white space.
            write_at(file, 0, [memoryview(data.ljust(size))])
        finally:
            os.close(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which others of this kind wait for; go on without it after a second."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(50):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(file)


def free_bytes(path: Path) -> int:
    """Return how many bytes the user can still write to a folder's file system."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def open_regular(path: Path) -> int:
    """Open a file for reading, and return its descriptor: no link, no pipe, no device.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "it is not a regular file")
    return file


def _written(path: Path, data: bytes | memoryview, access: Access, durable: bool = False) -> Path:
    """Return a temporary file beside `path` that holds `data`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    file = create(temporary, access)
    try:
        append(file, data)
        if durable:
            sync(file)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(file)
    return temporary
