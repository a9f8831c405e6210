"""Where this rank stands in its mesh: its claim is told, with the first tap that it holds for."""

from __future__ import annotations

from collections.abc import Callable

from ..format.claims import MeshEntry
from ..mesh import Mesh, MeshWatch
from .claim import Claim

_MOST_MESHES = 256
_MOST_AXES = 16_000  # of all meshes, so that the claim stays a small file


class Standing:
    """Where one session's rank stands.

    Whoever calls `note` holds the lock under which the session ends: a claim that was closed in the
    meantime must not be written as one that is running.

    Args:
        warn: says once that a mesh cannot be written down, from (what it is about, the message).
    """

    def __init__(self, warn: Callable[[tuple[str, ...], str], None]) -> None:
        self._warn = warn
        self._watch = MeshWatch()
        self._is_fixed = False
        self._fixed: Mesh | None = None
        self._noted: Mesh | None = None

    def fix(self, mesh: Mesh | None) -> None:
        """Let the rank stand where this says, whatever is to be found in this process."""
        self._is_fixed, self._fixed = True, mesh

    def current(self, step: int) -> Mesh | None:
        """Return where the rank stands now; None where nobody says."""
        return self._fixed if self._is_fixed else self._watch.current(step)

    def is_noted(self, mesh: Mesh | None) -> bool:
        """Whether that is where the rank was said to stand last."""
        return mesh == self._noted

    def note(self, claim: Claim, seq: int, mesh: Mesh | None) -> None:
        """Write down where the rank stands from a tap on, if that was not known before.

        Args:
            claim: where to write it.
            seq: the tap's position in execution order.
            mesh: where the rank stood at that tap.

        Raises:
            OSError: it cannot be written.
        """
        if mesh == self._noted:
            return
        known: list[MeshEntry] = claim.facts.get("meshes", [])
        axes = None if mesh is None else {axis: [*place] for axis, place in mesh.items()}
        if len(known) >= _MOST_MESHES or sum(len(m["axes"] or ()) for m in known) > _MOST_AXES:
            self._warn(
                ("meshes",),
                f"the mesh has changed {len(known)} times, and what follows is recorded "
                "without its place in it; declare all axes in one, under other names where "
                "they cut other tensors",
            )
            if known[-1]["axes"] is None:
                return
            axes = None
        self._noted = None if mesh is None else dict(mesh)
        # Another thread's tap may have got its number before this one, and got here later.
        seq = max(seq, known[-1]["seq"]) if known else seq
        claim.update({"meshes": [*known, {"seq": seq, "axes": axes}]})
