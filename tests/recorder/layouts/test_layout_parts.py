"""Several tensors one behind the other along a dim: what each is called, and where it lies."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from recorder.errors import LayoutError
from recorder.layouts.parse import parse_dims
from recorder.layouts.parts import has_parts, names_of, parts_of

G, R, D = 2, 3, 4
MEGATRON = "s b (g*{q: (r*d) | k: d | v: d})[tp]"
SERVED = "t {q: (g*r*d)[tp] | k: (g*d)[tp] | v: (g*d)[tp]}"


def views(text, tensor, sizes=None, mesh=None):
    return {p.name: (p.dims, p.view(tensor)) for p in parts_of(text, tensor.shape, sizes, mesh)}


def refused(text, shape, said, sizes=None, mesh=None):
    with pytest.raises(LayoutError) as caught:
        parts_of(text, shape, sizes, mesh)
    assert said in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 800


def test_parts_are_told_from_other_layouts():
    assert has_parts("s {a: h | b: h}") and not has_parts("s (a*b)[tp]")
    assert names_of(MEGATRON) == ("q", "k", "v")


def test_parts_interleaved_by_group_have_what_stands_before_them_as_a_dim_of_its_own():
    tensor = torch.arange(5 * G * (R + 2) * D).view(5, 1, -1)
    got = views(f"{MEGATRON} # r={R} d={D}", tensor)
    assert {name: dims for name, (dims, _) in got.items()} == {
        "q": f"s b g[tp] (r*d) # r={R} d={D}",
        "k": f"s b g[tp] d # d={D}",
        "v": f"s b g[tp] d # d={D}",
    }
    grouped = tensor.reshape(5, 1, G, R + 2, D)
    assert torch.equal(got["q"][1], grouped[..., :R, :].reshape(5, 1, G, R * D))
    assert torch.equal(got["k"][1], grouped[..., R, :])
    assert torch.equal(got["v"][1], grouped[..., R + 1, :])


def test_parts_of_each_rank_stay_dims_of_one():
    tensor = torch.arange(3 * G * (R + 2) * D).view(3, -1)
    got = views(SERVED, tensor, {"r": R, "d": D, "unused": 7})
    assert got["q"][0] == f"t (g*r*d)[tp] # r={R} d={D}" and got["k"][0] == f"t (g*d)[tp] # d={D}"
    q, k, v = tensor.split([G * R * D, G * D, G * D], 1)
    assert all(torch.equal(got[name][1], one) for name, one in zip("qkv", (q, k, v), strict=True))


def test_factors_behind_the_parts_are_a_dim_of_their_own():
    tensor = torch.arange(10 * D)
    got = views("({q: h[tp] | k: g[tp] | v: g[tp]}*d)", tensor, {"h": 6, "d": D}, {})
    assert got["q"][0] == "h[tp] d" and got["v"][0] == "g[tp] d"
    assert torch.equal(got["v"][1], tensor.view(10, D)[8:])
    got = views("(g*{q: r | k: 1}*d)[tp]", torch.arange(2 * 4 * D), {"r": 3, "d": D})
    assert got["k"][0] == "g[tp] 1 d" and got["k"][1].shape == (2, 1, D)


def test_the_cut_at_the_first_factor_is_one_of_the_dim():
    inside = "s b (g[tp]*{q: (r*d) | k: d | v: d}) # r=3 d=4"
    outside = f"{MEGATRON} # r=3 d=4"
    assert parts_of(inside, (5, 1, 40)) == parts_of(outside, (5, 1, 40))


def test_what_is_said_behind_the_sign_goes_to_the_parts_that_have_the_name():
    text = "b {x: f[tp] | y: e} # f:padded f:fill=0 b=3 e=2 ep:replicated"
    assert [part.dims for part in parts_of(text, (3, 10))] == [
        "b f[tp] # f:padded f:fill=0 b=3 ep:replicated",
        "b e # b=3 e=2 ep:replicated",
    ]


def test_all_sizes_but_one_are_needed_and_they_are_those_of_the_whole():
    shape = (5, G * (R + 2) * D)
    every = {"g": 2 * G, "r": R, "d": D}
    for known in (every, *({n: every[n] for n in every if n != gone} for gone in every)):
        got = parts_of(SERVED, shape, known, {"tp": (1, 2)})
        assert [part.length for part in got] == [G * R * D, G * D, G * D]
    # Where nobody says how many ranks there are, it follows too, if all else is known.
    everything = {"g": 4 * G, "r": R, "d": D}
    assert [p.length for p in parts_of(SERVED, shape, everything)] == [G * R * D, G * D, G * D]
    refused(SERVED, shape, "the size of r is not known; declare it as '# r=SIZE'", {"d": D})
    refused(SERVED, shape, "the sizes of r and d are not known; declare them as '# r=SIZE d=SIZE'")
    refused(SERVED, shape, "recorder.declare_mesh(tp=(rank, size))", {"g": 4, "d": D})


def test_sizes_that_contradict_the_shape_are_refused():
    sizes = {"r": R, "d": D}
    refused(
        SERVED, (5, 41), "has 41 here, which is not what its parts make with r=3 and d=4", sizes
    )
    said = (
        "not what its parts make with g=4, r=3, d=4 and tp of 1; declare_mesh(tp=(rank, size)) if"
    )
    refused(SERVED, (5, 40), said, {**sizes, "g": 4}, {})
    said = "as in '# f:padded'"
    refused("{x: f[tp] | y: f[tp]} # f=10", (12,), said, mesh={"tp": (0, 2)})
    got = parts_of("{x: f[tp] | y: f[tp]} # f=10 f:padded", (12,), mesh={"tp": (0, 2)})
    assert [part.length for part in got] == [6, 6]
    said = "2 blocks of f[tp] with f=9 and tp of 2 are uneven; leave out the size of f"
    refused("{x: f[tp] | y: f[tp]} # f=9", (10,), said, mesh={"tp": (0, 2)})
    refused(SERVED, (5, 5, 40), "name 2, and its tensor has the shape [5, 5, 40]", sizes)


def test_fewer_groups_than_ranks_cut_through_the_parts():
    said = (
        "so that ranks are cut through its parts; tap its parts where each is a tensor of its own"
    )
    refused(MEGATRON, (5, 1, 40), said, {"g": G, "r": R, "d": D}, {"tp": (0, 4)})


def test_heads_that_ranks_share_are_parts_of_each():
    text = "t {q: (g*r*d)[tp] | k: (g*d)[tp:repeat] | v: (g*d)[tp:repeat]}"
    sizes, mesh = {"g": 2, "r": 4, "d": D}, {"tp": (3, 4)}
    got = parts_of(text, (5, 4 * D), sizes, mesh)
    assert [part.length for part in got] == [2 * D, D, D]
    assert got[1].dims == "t (g*d)[tp:repeat] # g=2 d=4"
    refused(text, (5, 4 * D), "declare it as '# g=SIZE'", {"r": 4, "d": D}, mesh)
    refused(text, (5, 4 * D), "declare_mesh(tp=(rank, size))", sizes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s {q: h | k", "the brace at '{q: h | k' is not closed"),
        ("s }{", "is not closed"),
        ("s {q: h | q: h}", "the part 'q' stands in it twice"),
        ("s {q: | k: h}", "'q:' is not a part such as 'q: (heads*d)'"),
        ("s {q: h |}", "'' is not a part"),
        ("s {}", "'' is not a part"),
        ("s {q: {a: b}}", "'{q: {a: b}' have parts themselves"),
        ("{q: h} {k: h}", "'{k: h}': one dim can have parts, no more"),
        ("(s*{q: h}", "the parenthesis around its parts is not closed"),
        ("({q: h})", "is not written as in '(g*{q: r | k: 1}*d)'"),
        ("x{q: h}", "neither a dim nor a factor of one"),
        ("{q: h | k: h}[tp]", "the cut [tp] goes through the parts; write it in each part"),
        ("(g*{q: r[tp] | k: r})", "'r[tp]' is cut, and is not the outermost of its dim"),
        ("({q: h | k: g}*d[tp])", "'d[tp]' is cut behind the parts"),
        ("(g*x[tp]*{q: h})", "'x' is cut inside '(g*x[tp])'"),
        ("(g[tp]*{q: h})[cp]", "it is cut at 'g[tp]' and by [cp]; write its cuts once"),
        ("{q: h | k: g} # z=3", "'z' after the # is not one of its dims"),
        ("{q: h | k: g} # h", "'h' after the # is not one of AXIS:replicated"),
        ("{q: h | k: g} # grad: h", "the gradient of what has parts has the same"),
        ("{q: s h}", "the part 's h' is of 2 dims, expected 1"),
        ("s {q: s | k: d}", "the dim 's' stands in it twice"),
        ("{" * 5000 + "}", "have parts themselves"),
        ("s h", "it has no parts"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_place(text, said):
    refused(text, (4,), said)


def test_a_view_is_one_of_the_tensor_s_own_memory():
    text = f"b (g*{{q: (r*d) | k: d | v: d}}) # r={R} d={D}"
    wide = torch.zeros(2 * G * (R + 2) * D, 3)[::2].T  # neither contiguous nor to be flattened
    with torch.inference_mode():
        inference = torch.zeros(3, G * (R + 2) * D)
    for tensor in (wide, inference, torch.zeros(3, 2, 40).transpose(0, 1)[1]):
        with torch.inference_mode(tensor.is_inference()):
            got = views(text, tensor)
            got["k"][1].fill_(7)
            assert (tensor.reshape(3, G, R + 2, D)[:, :, R] == 7).all()
            assert int((tensor == 7).sum()) == 3 * G * D
    x = torch.randn(3, G * (R + 2) * D, requires_grad=True)
    views(text, x * 2)["v"][1].sum().backward()
    assert torch.equal(x.grad.view(3, G, R + 2, D)[:, :, R + 1], torch.full((3, G, D), 2.0))
    assert int((x.grad != 0).sum()) == 3 * G * D


PLACED = "# DTensor [4, 6, 40] tp:1/2={}"


def test_parts_of_a_dtensor_have_its_placements():
    text = f"b[fsdp] s (g*{{q: (r*d) | k: d | v: d}})[tp] # r={R} d={D} "
    mesh = {"fsdp": (0, 2)}
    got = parts_of(text + PLACED.format("Shard(dim=2)"), (4, 6, 20), mesh=mesh)
    placed = "# DTensor [4, 6, 2, 12] tp:1/2=Shard(dim=2)"
    assert got[0].dims == f"b[fsdp] s g[tp] (r*d) # r=3 d=4 {placed}"
    got = parts_of(text + PLACED.format("Replicate()"), (4, 6, 40), mesh=mesh)
    assert parse_dims(got[1].dims).cut_axes == ("fsdp",) and got[1].dims.endswith("Replicate()")
    got = parts_of("{x: h | y: h} s f " + PLACED.format("Shard(dim=2)"), (4, 6, 20))
    assert got[0].dims == "h s f # DTensor [2, 6, 40] tp:1/2=Shard(dim=2)"
    got = parts_of("b ({x: h | y: h}*d) f # d=3 " + PLACED.format("Shard(dim=2)"), (4, 6, 20))
    assert got[0].dims == "b h d f # d=3 # DTensor [4, 1, 3, 40] tp:1/2=Shard(dim=3)"


def test_a_dtensor_whose_placements_cut_through_its_parts_is_refused():
    placed = PLACED.format("Shard(dim=2)")
    said = "the DTensor's own placements cut its 40 as one over 2 ranks, and so through its parts"
    refused(f"b s {{x: f[tp] | y: f[tp]}} {placed}", (4, 6, 20), said)
    said = "they cut b over tp, and a placement cuts"
    refused(f"b[tp] s (g*{{x: d | y: d}}) # d=4 {placed}", (4, 6, 20), said)
    uneven = "# DTensor [4, 6, 24] tp:1/2=Shard(dim=2)"
    said = "cut its 24 as one over 2"
    refused(f"b s (g*{{x: d | y: d}})[tp] # d=4 {uneven}", (4, 6, 8), said)


def random_case(rng):
    """A tensor of a rank in one of four forms, its text, and each part by plain indexing."""
    ranks = rng.choice((1, 2, 3))
    k = rng.randrange(ranks)
    g, r, d, b = rng.randint(1, 3) * ranks, rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3)
    q, key, v = (torch.randn(b, g, n, d) for n in (r, 1, 1))
    form = rng.choice(("inside", "outside", "behind", "whole"))
    mine = [one.chunk(ranks, 1)[k] for one in (q, key, v)]
    if form in ("outside", "whole"):
        if form == "whole":
            mine, ranks = [q, key, v], 1
        tensor = torch.cat(mine, 2).flatten(1)
        text = "b (g*{q: (r*d) | k: d | v: d})" + "[tp]" * (form == "outside")
        wanted = [mine[0].flatten(2), mine[1].flatten(2), mine[2].flatten(2)]
    elif form == "inside":
        tensor = torch.cat([one.flatten(1) for one in mine], 1)
        text = "b {q: (g*r*d)[tp] | k: (g*d)[tp] | v: (g*d)[tp]}"
        wanted = [one.flatten(1) for one in mine]
    else:
        tensor = torch.cat([one.flatten(1, 2) for one in mine], 1).flatten(1)
        text = "b ({q: (g*r)[tp] | k: g[tp] | v: g[tp]}*d)"
        wanted = [one.flatten(1, 2) for one in mine]
    sizes = {"g": g, "r": r, "d": d}
    mesh = {"tp": (k, ranks)} if ranks > 1 else {}
    left_out = rng.choice(("g", "r", "d", ""))
    sizes.pop(left_out, None)
    in_text = [name for name in sizes if rng.random() < 0.5]
    if in_text:
        text += " # " + " ".join(f"{name}={sizes.pop(name)}" for name in in_text)
    return text, tensor, sizes, mesh, wanted


def test_random_sizes_as_plain_indexing_has_them():
    rng = random.Random(0)
    for case in range(400):
        text, tensor, sizes, mesh, wanted = random_case(rng)
        if rng.random() < 0.5:
            tensor = tensor.T.contiguous().T
        try:
            got = [part.view(tensor) for part in parts_of(text, tensor.shape, sizes, mesh)]
        except LayoutError as err:
            raise AssertionError(
                f"case {case}: {text} {list(tensor.shape)} {sizes} {mesh}"
            ) from err
        for one, other in itertools.zip_longest(got, wanted):
            assert torch.equal(one, other), f"case {case}: {text} {list(tensor.shape)} {sizes}"
            assert one.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
