"""A layout as plain data: what each dim is called, which axes cut it; `parse` reads its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TOKENS = "t"
"""The name of a dim of flattened tokens, whose sequence lengths are in the extras."""
BATCH, SEQUENCE = "b", "s"
REPLICAS = ("error", "first", "last", "mean")
"""What to do where ranks that should hold the same block do not, or rows recorded twice differ."""


@dataclass(frozen=True)
class Cut:
    """One axis that cuts a dim.

    Attributes:
        axis: its name.
        zigzag: whether rank k of n gets chunks k and 2n-1-k of 2n, as context parallelism does to
            balance causal attention; else chunk k of n.
        rule: `chunk` or `split` where that was declared, else "".
        share: how many neighbours along the axis hold the same block.
        repeat: whether as many do as it takes, see `repeats`.
    """

    axis: str
    zigzag: bool = False
    rule: str = ""
    share: int = 1
    repeat: bool = False

    def __str__(self) -> str:
        return self.declared("")

    def declared(self, rule: str) -> str:
        """Return it as written, with a rule."""
        axis = f"{self.axis}/{self.share}" if self.share > 1 else self.axis
        words = ["zigzag"] * self.zigzag + [rule] * bool(rule) + ["repeat"] * self.repeat
        return f"{axis}:{'+'.join(words)}" if words else axis


@dataclass(frozen=True)
class Dim:
    """One dim of a tensor: no names for a `1`, several for a fused dim, outermost first.

    `called` is what its tap calls it, where that is not its names.
    """

    names: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()
    called: str = ""

    def __str__(self) -> str:
        text = self.label
        if self.cuts:
            text += f"[{','.join(map(str, self.cuts))}]"
        return text

    @property
    def label(self) -> str:
        """Its name as declared, without the cuts."""
        if self.called or len(self.names) == 1:
            return self.called or self.names[0]
        return f"({'*'.join(self.names)})" if self.names else "1"


@dataclass(frozen=True)
class Dims:
    """A layout as declared.

    Attributes:
        text: as written.
        dims: its dims, one for each of the tensor's.
        partial: axes over which ranks hold partial results, each with how to reduce them.
        replicated: axes declared replicated.
        data: axes whose ranks hold other data (`dp`) or other layers (`pp`).
        sizes: name -> size without padding, where declared.
        padded: names of dims with padding behind their end.
        fills: name -> what a graft writes into the target's padding, where declared.
        mesh: a DTensor's: axis -> this rank's coordinate (None where not known) and the size.
        shape: a DTensor's whole shape, which other axes may have cut out of a larger one.
        aliases: axis outside a DTensor's mesh -> axes of it that it may be another name of, since
            both cut one dim.
        is_named: whether the dims' names were declared, and not just counted.
        is_line: whether its `t` was declared as `s`, see `with_tokens`.
    """

    text: str
    dims: tuple[Dim, ...]
    partial: tuple[tuple[str, str], ...] = ()
    replicated: frozenset[str] = frozenset()
    data: frozenset[str] = frozenset(("dp", "pp"))
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    padded: frozenset[str] = frozenset()
    fills: Mapping[str, float] = field(default_factory=dict, hash=False)
    mesh: Mapping[str, tuple[int | None, int]] | None = field(default=None, hash=False)
    shape: tuple[int, ...] | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    is_named: bool = True
    is_line: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all dims, fused ones taken apart, in order."""
        return tuple(name for dim in self.dims for name in dim.names)

    @property
    def cut_axes(self) -> tuple[str, ...]:
        """The axes that cut a dim, in order."""
        return tuple(cut.axis for dim in self.dims for cut in dim.cuts)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes over which blocks differ: cut or partial."""
        return (*self.cut_axes, *(axis for axis, _ in self.partial))

    def says_the_same(self, other: Dims) -> bool:
        """Whether two ranks declare one layout; their coordinates may differ."""
        sizes = [{axis: n for axis, (_, n) in (one.mesh or {}).items()} for one in (self, other)]
        plain = [replace(one, text="", mesh=None) for one in (self, other)]
        return sizes[0] == sizes[1] and plain[0] == plain[1]

    def known(self, i: int, axes: Mapping[str, int]) -> int | None:
        """The size of a DTensor's whole along a dim; None where other axes cut that, or of none."""
        if self.shape is None or self.mesh is None:
            return None
        outside = (cut.axis for cut in self.dims[i].cuts if cut.axis not in self.mesh)
        return None if any(axes[axis] > 1 for axis in outside) else self.shape[i]

    def whole(self, shape: tuple[int, ...]) -> Dims:
        """The layout of the tensor that nothing cuts, of some shape, its padding left out."""
        sizes = {d.names[0]: n for d, n in zip(self.dims, shape, strict=True) if len(d.names) == 1}
        return replace(
            self,
            text=f"whole {self.text}",
            dims=tuple(Dim(dim.names) for dim in self.dims),
            partial=(),
            data=frozenset(),
            sizes={name: n for name, n in sizes.items() if name in self.sizes},
            padded=frozenset(),
            fills={},
            mesh=None,
            shape=None,
            aliases={},
        )

    def with_tokens(self, other: Dims) -> Dims:
        """This layout with `s` called `t` where the other side has tokens, and nobody a batch."""
        names = {*self.names, *other.names}
        is_line = BATCH not in names and TOKENS in other.names and SEQUENCE not in other.names
        return self.in_tokens() if is_line else self

    def in_tokens(self) -> Dims:
        """This layout with `s` called `t`, where it has no batch."""
        if SEQUENCE not in self.names or {BATCH, TOKENS} & {*self.names}:
            return self
        renamed = {SEQUENCE: TOKENS}
        dims = tuple(
            replace(
                dim,
                names=tuple(renamed.get(name, name) for name in dim.names),
                called=dim.label if SEQUENCE in dim.names else "",
            )
            for dim in self.dims
        )
        return replace(
            self,
            dims=dims,
            is_line=True,
            sizes={renamed.get(name, name): size for name, size in self.sizes.items()},
            padded=frozenset(renamed.get(name, name) for name in self.padded),
            fills={renamed.get(name, name): fill for name, fill in self.fills.items()},
        )

    def renamed(self, other: Dims) -> Dims:
        """This layout with the names of another's dims, by position."""
        dims = tuple(Dim(o.names, d.cuts) for d, o in zip(self.dims, other.dims, strict=True))
        return replace(self, dims=dims, is_named=True)
