"""`--rename`: which rule holds; and replay, localize, check and bisect take it as diff does."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from recorder import Recorder, Recording, tap
from recorder.errors import UsageError
from replayer import Replayer, bisect, check, diff, localize
from replayer.rename import Rename, oriented_to, parsed, renamed
from replayer.settings import ReplaySettings

RULES = ("attn=layers.{layer}.self_attn", "mlp=layers.{layer}.mlp.out")


def off_by(x, noise):
    return x if noise is None else x * (1 + 1e-3 * torch.randn(x.shape, generator=noise))


def baseline(noise=None):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=random)
    for layer in range(4):
        w = torch.randn(2, 8, 8, generator=random) / 8**0.5
        x = tap("attn", off_by(x @ w[0], noise), layer=layer)
        x = tap("mlp", torch.tanh(x @ w[1]), layer=layer)
    return x


def target(wrong=None, noise=None):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=random)
    for layer in range(4):
        w = torch.randn(2, 8, 8, generator=random) / 8**0.5
        x = tap(f"layers.{layer}.self_attn", off_by(x @ w[0] * (2 if layer == wrong else 1), noise))
        x = tap(f"layers.{layer}.mlp.out", torch.tanh(x @ w[1]))
    return x


@pytest.fixture
def base(run):
    with Recorder(run):
        baseline()
    return run


def test_a_place_is_one_part_between_dots():
    (rule,) = parsed("layer_out=model.layers.{layer}")
    assert rule.apply("model.layers.3", {}) == ("layer_out", {"layer": 3})
    assert rule.apply("model.layers.3.input_layernorm", {}) is None
    (rule,) = parsed("h.{i}.{what}=model.{i}.{what}")
    assert rule.apply("model.3.attn", {}) == ("h.3.attn", {})
    assert rule.apply("model.3.attn.q", {}) is None


@pytest.mark.parametrize("turned", [False, True])
def test_the_rule_that_says_most_of_a_name_holds(turned):
    rules = parsed("any.{x}=m.{x};norm=m.norm;late.{x}=m.late_{x}")
    rules = rules[::-1] if turned else rules
    assert renamed(rules, "m.norm", {}) == ("norm", {})
    assert renamed(rules, "m.late_1", {}) == ("late.1", {})
    assert renamed(rules, "m.other", {}) == ("any.other", {})
    assert renamed(rules, "else", {"layer": 1}) == ("else", {"layer": 1})


def test_two_rules_that_say_as_much_are_not_guessed_among():
    rules = parsed("a.{x}=m.{x}.q;b.{y}=m.{y}.q")
    with pytest.raises(UsageError, match=r"both fit 'm.3.q', to 'a.3' and 'b.3'; say more"):
        renamed(rules, "m.3.q", {})
    assert renamed(parsed("a.{x}=m.{x}.q;a.{y}=m.{y}.q"), "m.3.q", {}) == ("a.3", {})


def test_an_ambiguity_fails_a_diff_and_the_grafts_that_it_is_about(base, tmp_path, capsys):
    rules = ("attn=layers.{layer}.self_attn", "mlp=layers.{layer}.self_attn")
    with Recorder(tmp_path / "target"):
        target()
    with pytest.raises(UsageError, match="both fit 'layers.0.self_attn'"):
        diff(base, tmp_path / "target", rename=rules)
    with Replayer(base, rename=rules) as replay:
        target()
    outcomes = dict(replay.log().group_by("outcome").len().iter_rows())
    assert outcomes == {"error": 4, "missing": 4}
    assert "both fit 'layers.0.self_attn', to 'attn' and 'mlp'" in capsys.readouterr().err


def test_a_replay_takes_the_records_that_are_called_otherwise(base):
    with Replayer(base, rename=RULES, strict=True) as replay:
        got = target(wrong=2)
    assert torch.equal(got, baseline())
    log = replay.log()
    assert set(log["outcome"]) == {"grafted"} and log["name"][0] == "layers.0.self_attn"
    assert log.filter(log["changed"] > 0)["name"].to_list() == ["layers.2.self_attn"]


def test_a_filter_speaks_of_the_target_s_names(base):
    chosen = 'name.startswith("layers.2.") or name == "layers.3.mlp.out"'
    with Replayer(base, rename=RULES, filter=chosen, strict=True) as replay:
        target()
    summary = replay.summary()
    assert (summary.outcomes, summary.selected, summary.unused) == ({"grafted": 3}, 3, 0)


@pytest.mark.parametrize("match_on", ["name,layer", "name", "name,layer,step"])
def test_tags_that_count_are_those_after_renaming(base, match_on):
    with Replayer(base, rename=RULES, match_on=match_on) as replay:
        got = target(wrong=1)
    assert torch.equal(got, baseline()) and replay.log()["outcome"].unique().to_list() == [
        "grafted"
    ]


def test_taps_that_would_have_one_key_are_not_grafted_twice(base):
    with Replayer(base, rename="attn=layers.{layer}.self_attn;attn=other.{layer}") as replay:
        tap("layers.0.self_attn", torch.zeros(4, 8))
        tap("other.0", torch.zeros(4, 8))
    _, second = replay.log().rows(named=True)
    assert second["outcome"] == "error"
    assert "layers.0.self_attn and other.0 would have one key" in second["message"]


def test_a_rule_that_fits_no_tap_is_said(base):
    with Replayer(base, rename=(*RULES, "attn=block_{layer}")) as replay:
        target()
    assert replay.summary().notes == (
        "--rename 'attn=block_{layer}': 'block_{layer}' fits no tap of the target",
    )


def test_two_names_for_one_record_are_no_reason_to_fail(base):
    rules = ("attn=layers.{layer}.self_attn", "attn=other.{layer}")
    chosen = 'name.startswith("layers.") or name.startswith("other.")'
    with Replayer(base, rename=rules, match_on="name,layer", filter=chosen) as replay:
        kept = [tap(f"layers.{i}.self_attn", torch.zeros(4, 8)) for i in range(4)]
    assert len(kept) == 4 and replay.summary().outcomes


def test_sides_the_other_way_round_are_turned(base):
    rules = parsed(";".join("=".join(reversed(rule.split("="))) for rule in RULES))
    assert [one.a.text for one in oriented_to(rules, ["attn", "mlp"])] == ["attn", "mlp"]
    with Replayer(base, rename=rules) as replay:
        target()
    assert set(replay.log()["outcome"]) == {"grafted"}


def test_localize_check_and_bisect_take_it_too(base, tmp_path):
    found = localize(base, lambda: target(wrong=2), rename=RULES)
    assert [one.place.name for one in found.found.faults] == ["layers.2.self_attn"]
    checked = check(base, target, rename=RULES, out=tmp_path / "check")
    assert checked.status == 0 and checked.taps == 8
    searched = bisect(
        base, lambda: target(wrong=2), rename=RULES, watch='name == "mlp" and layer == 3'
    )
    assert searched.found.name == "layers.2.self_attn"


@pytest.mark.parametrize("how", ["check", "recording", "truth"])
def test_floors_and_truths_are_of_the_baseline_s_names(base, tmp_path, how):
    """What the baseline is off from itself is no fault of a target with other names either."""

    other = tmp_path / "other"
    if how == "check":
        check(base, lambda: baseline(noise=torch.Generator().manual_seed(1)), out=other)
    else:
        with Recorder(other):
            baseline(noise=torch.Generator().manual_seed(1))
    options = {"truth": other} if how == "truth" else {"floor": [other]}
    options["rename"] = RULES

    def off():
        return target(noise=torch.Generator().manual_seed(2))

    assert localize(base, off, rename=RULES).status == 1
    assert localize(base, off, **options).status == 0


def test_the_variable_has_them_one_behind_the_other():
    settings = ReplaySettings.named({"rename": list(RULES)})
    text = settings.variables()["GRAFT_REPLAY_RENAME"]
    assert text == ";".join(RULES)
    assert ReplaySettings.from_variables({"GRAFT_REPLAY_RENAME": text}) == settings
    assert json.loads(json.dumps(settings.described()))["rename"] == list(RULES)
    assert ReplaySettings().variables()["GRAFT_REPLAY_RENAME"] is None
    with pytest.raises(UsageError, match="should be A's name for it, =, and B's"):
        ReplaySettings.from_variables({"GRAFT_REPLAY_RENAME": "attn"})


@pytest.mark.processes
@pytest.mark.slow
def test_the_commands_take_it_several_times(base, shell):
    assert Recording.open(base).manifest().height == 8
    shell.write(
        "job.py",
        """
        import torch
        from recorder import tap
        for layer in range(4):
            x = tap(f"layers.{layer}.self_attn", torch.ones(4, 8))
        """,
    )
    words = [word for rule in RULES for word in ("--rename", rule)]
    done = shell(shell.graft, "replay", base, *words, "--", shell.python, "job.py")
    assert done.returncode == 0 and "replay: 4 grafted; 4 of 8 selected" in done.stderr
    options = ["-o", "out", "--record", "True"]
    done = shell(shell.graft, "replay", base, *words, *options, "--", shell.python, "job.py")
    following = done.stderr.splitlines()[-1].removeprefix("[graft] next: graft ")
    again = shell(shell.graft, shlex.split(following))
    assert "4 pairs: " in again.stdout and "nothing matched" not in again.stderr
    wrong = shell(shell.graft, "replay", base, "--rename", "x=y.{i}", "--", shell.python, "job.py")
    assert "before COMMAND runs: --rename 'x=y.{i}': 'x' fits no record; there are" in wrong.stderr
    assert Rename.parse("x=y.{i}").literal == 2
