"""Where this rank stands on each axis that tensors are cut over: declared, or found.

1. `declare_mesh` says it; what it said last holds.
2. Without that `current_mesh` asks whichever of Megatron-Core, vLLM and sglang has its parallel
   groups up in this process, by what each calls its axes. Nothing is imported for that.
3. `global_layer` numbers a pipeline stage's layers through all stages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .errors import UsageError

Mesh = dict[str, tuple[int, int]]
"""Axis -> this rank's coordinate, from 0, and the axis's size."""

FrozenMesh = tuple[tuple[str, tuple[int, int]], ...]
"""A mesh as part of a key, sorted by axis."""

MOST_AXES = 64
MOST_RANKS = 1 << 40
_LONGEST = 64  # characters of a name
_HOW = "give each axis as declare_mesh(tp=(rank, size)), or a DeviceMesh with mesh_dim_names"

PIPELINE = "pp"
"""The axis whose ranks hold other layers."""

_declared: Mesh | None = None
_layer_offset: int | None = None
_learned: Mesh = {}
_same: dict[str, str] = {}


def declare_mesh(
    mesh: Any = None, /, *, layer_offset: int | None = None, **axes: tuple[int, int]
) -> None:
    """Say where this rank stands, for the taps that declare `dims`.

    ```python
    declare_mesh(tp=(tp_rank, tp_size), cp=(cp_rank, cp_size))
    declare_mesh(device_mesh)
    ```

    What an earlier call said is forgotten: all axes are declared at once. Without arguments, the
    axes are looked for again in Megatron-Core's, vLLM's and sglang's parallel groups.

    Args:
        mesh: a torch `DeviceMesh` whose dims have names.
        layer_offset: how many layers earlier stages of the pipeline have, for `global_layer`.
        **axes: for each axis this rank's coordinate on it, from 0, and the axis's size.

    Raises:
        UsageError: a coordinate does not lie on its axis, or the mesh has no names, or this rank is
            not in it.
    """
    global _declared, _layer_offset
    if layer_offset is not None and (type(layer_offset) is not int or layer_offset < 0):
        raise UsageError(
            f"declare_mesh: layer_offset is {layer_offset!r}; give the number of layers that "
            "earlier stages have"
        )
    found = {} if mesh is None else _of_device_mesh(mesh)
    for axis, place in axes.items():
        found[axis] = _checked(axis, place)
    if len(found) > MOST_AXES or any(len(axis) > _LONGEST for axis in found):
        raise UsageError(
            f"declare_mesh: expected at most {MOST_AXES} axes, their names of at most {_LONGEST} "
            "characters"
        )
    _declared = found if mesh is not None or axes else None
    _layer_offset = layer_offset


def global_layer(layer: int, of: int | None = None) -> int:
    """Return the number of a layer among those of all pipeline stages, from this stage's own.

    ```python
    tap("attn_out", h, layer=global_layer(i))
    ```

    Args:
        layer: its number on this stage, from 0.
        of: how many layers there are in all, where every stage has as many and
            `declare_mesh(layer_offset=...)` does not say how many earlier ones have.

    Raises:
        UsageError: there are several stages, and nobody says how many layers earlier ones have.
    """
    if _layer_offset is not None:
        return layer + _layer_offset
    stage, stages = (current_mesh() or {}).get(PIPELINE, (0, 1))
    if stage == 0:
        return layer
    if of is None or of % stages:
        raise UsageError(
            f"global_layer: nobody says how many layers come before stage {stage} of {stages}; "
            "declare it: recorder.declare_mesh(..., layer_offset=N)"
        )
    return layer + stage * (of // stages)


def learn_mesh(mesh: Any) -> None:
    """Take note of a DeviceMesh that the job's own tensors lie on; it holds where nobody says more.

    One without names says nothing.
    """
    try:
        _learned.update(_of_device_mesh(mesh))
    except UsageError:  # no names, or this rank is not in it
        pass


def learn_axis(axis: str, same_as: str | None) -> None:
    """Take note that an axis is another by its other name, as `sp` is `tp`; None: no longer."""
    if same_as is None:
        _same.pop(axis, None)
    else:
        _same[axis] = same_as


def forget_axes() -> None:
    """Forget what models said of axes, once none is tapped any more."""
    _same.clear()
    _learned.clear()


def current_mesh() -> Mesh | None:
    """Return where this rank stands; None where nobody says."""
    mesh = _said_mesh()
    if not _same or mesh is None:
        return mesh
    return mesh | {
        axis: mesh[other] for axis, other in _same.items() if other in mesh and axis not in mesh
    }


def _said_mesh() -> Mesh | None:
    if _declared is not None:
        return _declared
    for module, find in _FRAMEWORKS:
        found = sys.modules.get(module)
        if found is None:
            continue
        try:
            mesh = find(found)
        except Exception:  # another version of it, or its groups are not up
            continue
        if mesh is not None:
            return mesh
    return dict(_learned) or None


class MeshWatch:
    """Where a session's rank stands; what a framework says is asked for once a step."""

    def __init__(self) -> None:
        self._found: Mesh | None = None
        self._step = -1

    def current(self, step: int) -> Mesh | None:
        """Return where this rank stands; see `current_mesh`."""
        if _declared is not None and not _same:
            return _declared
        if self._found is None or self._step != step:
            self._found, self._step = current_mesh(), step
        return self._found


def frozen(mesh: Mesh | None) -> FrozenMesh | None:
    """Return a mesh that can be part of a key."""
    return None if mesh is None else tuple(sorted(mesh.items()))


def _checked(axis: str, place: Any) -> tuple[int, int]:
    try:
        at, size = (int(number) for number in place)
    except (TypeError, ValueError):
        raise UsageError(f"declare_mesh: {axis} is {place!r}; {_HOW}") from None
    if not 0 <= at < size < MOST_RANKS:
        raise UsageError(
            f"declare_mesh: {axis}=({at}, {size}) is not a coordinate on an axis of {size}; "
            "coordinates count from 0 to size - 1"
        )
    return at, size


def _of_device_mesh(mesh: Any) -> Mesh:
    names = getattr(mesh, "mesh_dim_names", None)
    if not hasattr(mesh, "get_coordinate"):
        raise UsageError(f"declare_mesh: got a {type(mesh).__name__}; {_HOW}")
    if not names:
        raise UsageError(f"declare_mesh: the DeviceMesh has no mesh_dim_names; {_HOW}")
    at = mesh.get_coordinate()
    if at is None:
        raise UsageError(
            "declare_mesh: this rank is not in the DeviceMesh; call it on ranks that are"
        )
    return {
        axis_name(name): _checked(name, (k, n))
        for name, k, n in zip(names, at, mesh.mesh.shape, strict=True)
    }


def axis_name(name: object) -> str:
    """Return the name of a mesh's dim as an axis is written in a layout."""
    return re.sub(r"[^A-Za-z0-9_]", "_", str(name))


def _called(module: Any, axes: Mapping[str, str]) -> Mesh:
    """Return what a module says by functions `get_X_rank` and `get_X_world_size` or `_size`."""
    mesh: Mesh = {}
    for axis, what in axes.items():
        rank = getattr(module, f"get_{what}_rank", None)
        size = getattr(module, f"get_{what}_world_size", None)
        size = size or getattr(module, f"get_{what}_size", None)
        if rank is None or size is None:
            continue
        try:
            mesh[axis] = _checked(axis, (rank(), size()))
        except Exception:  # an axis that this job does not use
            continue
    return mesh


def _of_megatron(state: Any) -> Mesh | None:
    if not state.model_parallel_is_initialized():
        return None
    mesh = _called(
        state,
        {
            "tp": "tensor_model_parallel",
            "pp": "pipeline_model_parallel",
            "cp": "context_parallel",
            "dp": "data_parallel",
            "ep": "expert_model_parallel",
            "etp": "expert_tensor_parallel",
            "edp": "expert_data_parallel",
        },
    )
    # Sequence parallelism has no group of its own: it cuts over tensor parallelism's.
    settings = sys.modules.get("megatron.training.global_vars")
    if settings is not None and "tp" in mesh:
        try:
            if settings.get_args().sequence_parallel:
                mesh["sp"] = mesh["tp"]
        except Exception:  # a job without Megatron's own arguments
            pass
    return mesh or None


def _of_groups(state: Any) -> Mesh | None:
    """Return what vLLM's or sglang's group coordinators say."""
    mesh: Mesh = {}
    for axis, name in (
        ("tp", "get_tp_group"),
        ("pp", "get_pp_group"),
        ("dp", "get_dp_group"),
        ("ep", "get_ep_group"),
        ("dcp", "get_dcp_group"),
        ("pcp", "get_pcp_group"),
        ("moe_ep", "get_moe_ep_group"),
        ("moe_tp", "get_moe_tp_group"),
        ("moe_dp", "get_moe_dp_group"),
    ):
        get = getattr(state, name, None)
        if get is None:
            continue
        try:
            group = get()
            mesh[axis] = _checked(axis, (group.rank_in_group, group.world_size))
        except Exception:  # a group that this job does not use
            continue
    return mesh if "tp" in mesh else None


def _of_sglang(state: Any) -> Mesh | None:
    mesh = _of_groups(state)
    if mesh is None:
        return None
    attention = sys.modules.get("sglang.srt.layers.dp_attention")
    if attention is not None:
        mesh |= _called(
            attention,
            {"attn_tp": "attention_tp", "attn_dp": "attention_dp", "attn_cp": "attention_cp"},
        )
    return called_as_shared(mesh)


def called_as_shared(mesh: Mesh) -> Mesh:
    """Return a mesh with what taps that two systems share call axes that sglang calls otherwise."""
    others = (("ep", "moe_ep"), ("dp", "attn_dp"), ("cp", "attn_cp"))
    return {axis: mesh[called] for axis, called in others if called in mesh} | mesh


_FRAMEWORKS: tuple[tuple[str, Callable[[Any], Mesh | None]], ...] = (
    ("megatron.core.parallel_state", _of_megatron),
    ("sglang.srt.distributed.parallel_state", _of_sglang),
    ("vllm.distributed.parallel_state", _of_groups),
)
