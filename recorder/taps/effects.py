"""What torch's compiler is told of the operators of taps, by its private names; and what it tells.

An ordered effect is run once, and in its place among all others. Activation checkpointing marks
what it repeats, effects too, and repeating one would fire its tap again: `let_be_an_effect` has it
saved.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.fx.traceback as tracing
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.trace_rules import manual_torch_name_rule_map
from torch._guards import CompileContext, TracingContext
from torch._higher_order_ops import effects
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import checkpoint

from ..bits import is_lifted
from ..diagnostics import is_own

_RECOMPUTE = "recompute"
_OUTSIDE = getattr(torch.Tag, "cudagraph_unsafe", None)
_STATIC = "torch.fx.experimental.symbolic_shapes.statically_known_true"
_THROUGH = frozenset(
    {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "autograd.function"}
    | ({"invoke_subgraph"} if hasattr(effects, "_get_effect") else set())  # torch 2.10
)
"""What the compiler traces by itself and effects lead out of."""
LOWERING = 2
"""To be raised with what `_tell_inductor` tells: inductor's cache of programs asks not for that."""
OUTSIDE_GRAPHS = () if _OUTSIDE is None else (_OUTSIDE,)
"""Tags of an operator that is to be run between CUDA graphs, and not captured."""


version_preserved = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
"""Returns a block in which a write to a tensor is none to what autograd has saved."""


# torch 2.6 takes what collects a program's effects for none, and drops those at its end.
torch.fx.node.has_side_effect(torch.ops.prims._sink_tokens.default)


def _watched(fact: Any) -> bool:
    return True if fact else False  # noqa: SIM210  # 2.6 follows no bool() of it


is_known = statically_known_true if _STATIC in manual_torch_name_rule_map else _watched
"""Whether the compiler knows that something holds of sizes, which 2.6 can but watch."""


def let_be_an_effect(operator: Any) -> None:
    """Have an operator run once, whoever uses what it returns."""
    effects._register_effectful_op(operator, effects._EffectType.ORDERED)

    def in_checkpoint(mode: Any, *args: Any, **kwargs: Any) -> Any:
        _save(getattr(mode, "ac_graph_id", None))
        return operator(*args, **kwargs)

    def in_program(mode: Any, *args: Any, **kwargs: Any) -> Any:
        if _RECOMPUTE in tracing.current_meta:
            _save(None)
        return mode.__torch_dispatch__(operator, (), args, kwargs)

    # What is to be repeated is marked before it is traced (torch 2.6), or meanwhile (2.13).
    operator.py_impl(checkpoint._CachingTorchDispatchMode)(in_checkpoint)
    operator.py_impl(FunctionalTensorMode)(in_program)
    _tell_inductor(operator)


def _tell_inductor(operator: Any) -> None:
    """Have inductor run an operator out of CUDA graphs, behind the effects that stand before it.

    From torch 2.10 on it looks for an operator's tags where it finds but that there is some effect.
    And 2.13 and 2.14 forget the order: inductor notes what an effect waits for by the name of its
    buffer, and looks for it by that of its operation (pytorch/pytorch#188301).
    """
    try:
        from torch._inductor.ir import MultiOutput
        from torch._inductor.lowering import fallback_handler, register_lowering
        from torch._inductor.virtualized import V
    except ImportError:  # there is no inductor, so nobody is to be told
        return
    run = fallback_handler(operator, add_to_fallback_set=False)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        graph = V.graph
        waits = getattr(graph, "additional_star_deps", None)  # which a torch may have no more
        before = graph.effectful_ops.get(effects._EffectType.ORDERED)
        known = len(graph.operations)
        found = run(*args, **kwargs)
        made: list[Any] = graph.operations[known:]
        effect: Any = None
        for one in made:
            if getattr(one, "op_overload", None) is operator:
                if before is not None and waits is not None:
                    waits[one.get_operation_name()].add(before.get_name())
                one.fx_node = effect = _as_called(operator, one.fx_node)
            elif isinstance(one, MultiOutput):  # a graph would be given what holds all of them
                one.fx_node = effect
        return found

    register_lowering(operator, type_promotion_kind=None)(lowered)


def _as_called(operator: Any, effect: Any) -> Any:
    """Return a call of an operator that stands for the effect it is of."""
    made = torch.fx.Graph().create_node("call_function", operator, name=effect.name)
    made.meta = effect.meta
    return made


def _save(checkpoint_id: int | None) -> None:
    """Have the compiler save what it traces next."""
    meta = tracing.current_meta
    meta[_RECOMPUTE] = checkpoint.CheckpointPolicy.MUST_SAVE
    if checkpoint_id is not None:
        meta["ac_graph_id"] = checkpoint_id


def unfit_place() -> str:
    """Return why an effect cannot stand where the compiler is; "" where it can.

    What a branch or a loop runs is a program of its own, out of which no effect leads but where the
    backend runs it as it stands; and no effect is there for what is many tensors at once.
    """
    if is_lifted():
        return "it is inside torch.func (vmap, jvp); tap outside of it"
    if is_as_it_stands():
        return ""
    here = InstructionTranslator.current_tx().output
    around = [name for name, _ in here.current_tracer.source_fn_stack if name not in _THROUGH]
    if not around:
        return ""
    return (
        f"it is inside {around[0]}, out of which a compiled program keeps no tap; tap outside of "
        "it, or compile with the backend eager"
    )


def is_strictly_exported() -> bool:
    """Whether Dynamo traces what is to be exported."""
    try:
        return bool(InstructionTranslator.current_tx().export)
    except AttributeError:  # Dynamo traces nothing
        return False


def is_as_it_stands() -> bool:
    """Whether the backend runs a program as it is traced, loops and branches too."""
    backend = InstructionTranslator.current_tx().output.compiler_fn
    return getattr(backend, "compiler_name", "") == "eager"


def put_in_program(operator: Any, about: str) -> None:
    """Have the whole program that is traced run an operator, whatever is being traced of it."""
    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    while tracer.parent is not None:
        tracer = tracer.parent
    graph = tracer.graph
    graph.call_function(operator, (graph.call_function(torch.zeros, (0,)), about))


_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def traced_program() -> Any:
    """Return what stands for the program that is being traced, anew each time; None for none."""
    return TracingContext.try_get()


_blocks: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()


def blocks_in_program() -> list[int]:
    """Return the numbers of the blocks around what is traced; whoever traces one adds it."""
    program = traced_program()
    return [] if program is None else _blocks.setdefault(program, [])


def name_of_program() -> str:
    """Return what tells the program that is traced from others of the process, "" where nothing."""
    found = CompileContext.current_compile_id()
    return "" if found is None else str(found)


def number_in_program() -> int:
    """Return a number that no other tap in the program has that is traced."""
    program = traced_program()
    if program is None:
        return 0
    _numbers[program] = _numbers.get(program, -1) + 1
    return _numbers[program]


def traced_site() -> str:
    """Return where in the user's code the compiler is, `file:line`; "" where it is nowhere."""
    if TracingContext.try_get() is None:
        return ""
    found = [one for one in TracingContext.extract_stack() if not is_own(one.filename)]
    return f"{found[-1].filename}:{found[-1].lineno}" if found else ""
