"""Pages of made-up diffs, and how to read them."""

from __future__ import annotations

import math
import random
from collections import Counter

from replayer.diffing.columns import OUTCOMES

COLUMNS = [
    "label",
    "name",
    "layer",
    "step",
    "rank",
    "occurrence",
    "kind",
    "outcome",
    "dtype",
    "shape",
    "numel",
    "changed",
    "mismatched",
    "max_abs",
    "mean_abs",
    "rel_diff",
    "cosine",
    "p50",
    "p99",
    "p999",
    "max_ulp",
    "bias",
    "nan",
    "inf",
    "times_floor",
    "ranks_differ",
    "where",
    "message",
    "reordered",
    "grafted",
]


HOSTILE = (
    "</script><script>document.title='owned'</script><!-- <img src=x onerror=alert(1)> "
    "& \u2028\u2029 \U0001f600 ' \" \\ __DATA__"
)


def row(name="hidden", layer=None, outcome="equal", rel_diff=None, **more):
    """One pair; its figures follow from its rel_diff."""
    size = rel_diff if isinstance(rel_diff, float) else None
    full = dict.fromkeys(COLUMNS) | {
        "label": name if layer is None else f"{name} layer={layer}",
        "name": name,
        "layer": layer,
        "step": 0,
        "occurrence": 0,
        "kind": "tensor",
        "outcome": outcome,
        "dtype": "bfloat16",
        "shape": "2x512x128",
        "numel": 131072,
        "ranks_differ": [],
        "where": "",
        "message": "",
        "reordered": False,
        "grafted": False,
    }
    if outcome == "equal":
        full |= {"rel_diff": 0.0, "max_abs": 0.0, "mean_abs": 0.0, "changed": 0, "cosine": 1.0}
    if size is not None:
        full |= {
            "rel_diff": size,
            "max_abs": math.sqrt(size),
            "mean_abs": math.sqrt(size) / 9,
            "changed": min(131072, 1 + int(size * 1e18)),
            "mismatched": int(size * 1e6),
            "cosine": 1 - size / 2,
            "p50": math.sqrt(size) / 20,
            "p99": math.sqrt(size) / 3,
            "p999": math.sqrt(size) / 2,
            "max_ulp": 1 + int(math.sqrt(size) * 4096),
            "bias": -size / 7,
            "nan": 0,
            "inf": 0,
            "where": "[0, 1, 5]: 0.12 in A, 0.08 in B",
        }
    elif rel_diff is not None:
        full["rel_diff"] = rel_diff
    return full | more


def as_number(size):
    """A figure as it sorts: an unknown one is like an infinite one."""
    return math.inf if size is None else float(size)


def comparison(rows, details=(), **more):
    """What the page is given, around these pairs."""
    counts = dict.fromkeys([*OUTCOMES, "reordered"], 0) | Counter(r["outcome"] for r in rows)
    beyond = [i for i, r in enumerate(rows) if r["outcome"] in ("differs", "shape")]
    more_or_less = ("close", "unmeasured", "differs", "shape")
    apart = [i for i, r in enumerate(rows) if r["outcome"] in more_or_less]
    worst = sorted(
        range(len(rows)),
        key=lambda i: (OUTCOMES.index(rows[i]["outcome"]), -as_number(rows[i]["rel_diff"]), i),
    )
    first = {"bitwise": apart[0] if apart else None, "tolerance": beyond[0] if beyond else None}
    lines = [f"{len(rows)} pairs: " + ", ".join(f"{n} {k}" for k, n in counts.items() if n)]
    for key, words in ("bitwise", "bit for bit"), ("tolerance", "beyond tolerance"):
        if first[key] is not None:
            found = rows[first[key]]
            lines.append(f"first divergence {words}: {found['label']} at step {found['step']}")
    return {
        "version": "0.1.0",
        "a": {"path": "runs/base", "ranks": 2, "records": 176, "command": "torchrun train.py"},
        "b": {"path": "runs/target", "ranks": 2, "records": 176, "command": "torchrun infer.py"},
        "floor": [],
        "rules": ["close: rel_diff at most 1e-06", "ranks are compared one to one"],
        "lines": lines,
        "counts": counts,
        "first": first,
        "outcomes": list(OUTCOMES),
        "rows": {
            **{key: [r[key] for r in rows] for key in COLUMNS},
            "worst": sorted(range(len(rows)), key=worst.__getitem__),
        },
        "left_out": 0,
        "details": list(details),
    } | more


def detail(index, positions=128, bins=40, heads=8):
    """Strip, histogram and figures by head of one tensor."""
    rng = random.Random(index)
    sizes = [0.0 if p < positions // 3 else 10 ** rng.uniform(-6, -1) for p in range(positions)]
    sizes[-1] = None
    bell = [int(20000 * math.exp(-(((k - bins / 2) / (bins / 7)) ** 2))) for k in range(bins)]
    return {
        "row": index,
        "strip": {
            "what": "t",
            "size": positions * 4,
            "per_cell": 4,
            "max_abs": sizes,
            "rel_diff": [x and x / 10 for x in sizes],
        },
        "histogram": {"low": -3.2, "high": 3.4, "a": bell, "b": [0, 0, *bell[:-4], 7, 1]},
        "by": {
            "dim": "h",
            "rows": [
                {
                    "index": h,
                    "max_abs": 10.0**-h,
                    "rel_diff": 10.0 ** -(h + 1),
                    "outcome": "differs",
                }
                for h in range(heads)
            ],
        },
    }


NAMES = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_norm", "mlp_out"]


def faulty(steps=2, layers=6, names=NAMES, ranks=2, fault=3):
    """A fault in one layer's last tap, rounding errors before it, and all that follows from it."""
    rng, rows = random.Random(0), []
    for step in range(steps):
        for rank in range(ranks):
            rows.append(row("embed", step=step, rank=rank))
        for layer in range(layers):
            for name in names:
                for rank in range(ranks):
                    after = layer > fault or (layer == fault and name == names[-1])
                    size = 10 ** (rng.uniform(-3, -1) if after else rng.uniform(-14, -10))
                    here = {"step": step, "rank": rank, "times_floor": size / 1e-11}
                    if not step and layer == 0:
                        rows.append(row(name, layer, step=step, rank=rank))
                    elif after or step:
                        far = after or rng.random() < 0.5
                        size = size if after else size * 1e6 if far else size
                        outcome = "differs" if far else "close"
                        rows.append(row(name, layer, outcome, size, **here))
                    else:
                        rows.append(row(name, layer, "close", size, **here))
        rows.append(row("logits", None, "differs", 0.017, step=step, ranks_differ=[0, 1]))
    rows.append(row("cache", 5, "only_b", step=1, rank=1, message="A has no such tap"))
    rows.append(row("mask", None, "shape", step=1, rank=0, message="2x512 in A, 2x1x512 in B"))
    worst = sorted(range(len(rows)), key=lambda i: -(rows[i]["rel_diff"] or 0))[:2]
    return comparison(rows, [detail(i) for i in worst], floor=["runs/again"])


def everything_an_error():
    return comparison(
        [
            row(n, k, "error", rank=0, message=f"{n}: its shard is damaged")
            for k in (0, 1)
            for n in NAMES
        ]
    )


def infinities():
    rows = [
        row("hidden", 0, "differs", "inf", max_abs="inf", bias="-inf", nan=3, inf=2, rank=0),
        row("hidden", 1, "differs", None, nan=7, rank=0),
        row("hidden", 2, "differs", 0.5, times_floor="inf", rank=0),
        row("hidden", 3, "unmeasured", rank=0),
    ]
    found = detail(0)
    found["strip"]["max_abs"][:3] = ["inf", None, "-inf"]
    found["by"]["rows"][0]["rel_diff"] = "inf"
    return comparison(rows, [found])


def hostile():
    rows = [
        row(HOSTILE, 1, "differs", 0.1, rank=0, message=HOSTILE, where=HOSTILE),
        row("</textarea>" * 40, 2, "error", rank=1, message=HOSTILE * 3),
        row("x" * 500, 2, "differs", 0.3, rank=1),
    ]
    sides = {"path": HOSTILE, "ranks": 2, "records": 3, "command": HOSTILE * 4}
    return comparison(
        rows, [detail(0)], a=sides, b=sides, lines=[HOSTILE], rules=[HOSTILE], floor=[HOSTILE]
    )


EXTREMES = {
    "faulty": faulty,
    "no pairs": lambda: comparison([]),
    "all equal": lambda: comparison([row("hidden", k, rank=0) for k in range(4)]),
    "one pair": lambda: comparison([row("logits", None, "differs", 0.3)]),
    "all errors": everything_an_error,
    "infinities": infinities,
    "hostile": hostile,
}


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def details(page):
    """What the open details say, by what they say it of."""
    return dict(zip(texts(page, "dialog[open] dt"), texts(page, "dialog[open] dd"), strict=True))


def labels(page):
    """The taps in the table, from top to bottom."""
    return texts(page, "#table tbody button")
