"""What localize names, what it leaves alone, and what it says of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import layered
import pytest
import torch
from layered import LAYERS, WIDTH, job

from recorder import Recorder, tap
from recorder.errors import RecordingError, UsageError
from replayer import Replayer, check, localize
from replayer.finding.located import located
from replayer.log import COLUMNS, OF_OWN_ERROR, read_log
from replayer.showing import faults as report


def named(found):
    return [(one.place.name, one.place.tag_values.get("layer")) for one in found.found.faults]


def test_the_segment_of_a_fault_is_named_and_nothing_else(base):
    found = localize(base(), job({("down", 2): lambda x: 4 * x}))
    (fault,) = found.found.faults
    assert named(found) == [("down", 2)] and found.status == 1 and not found.problems
    assert (fault.class_.word, fault.class_.factor) == ("scaled", pytest.approx(4))
    assert [(one.name, one.tag_values) for one in fault.begins] == [("up", {"layer": 2})]
    assert report.verdict(found) == (
        "fault: down layer=2 (from up layer=2): the target's values are 4.000 x the baseline's"
    )
    lines = report.lines(found)
    assert lines[1].startswith("11 other segments are equal bit for bit")
    assert lines[-1] == (
        "next: look at what lies between the taps up and down of layer 2 in the target; a tap "
        "between them would halve the segment"
    )


def test_without_a_fault_all_is_rounding(base):
    found = localize(base(), job({("up", 1): lambda x: (x.double() * (1 + 1e-9)).float()}))
    assert found.status == 0 and not named(found)
    assert report.verdict(found).startswith("no fault: 12 segments are")


def test_faults_behind_each_other_are_all_named_in_order_of_execution(base):
    wrong = {
        ("up", 3): lambda x: x.flip(1),
        ("up", 1): lambda x: x + 0.5,
        ("down", 3): lambda x: 2 * x,
    }
    found = localize(base(), job(wrong))
    assert named(found) == [("up", 1), ("up", 3), ("down", 3)]
    words = [one.class_.word for one in found.found.faults]
    assert words == ["shifted", "permuted", "scaled"]
    assert [line[:5] for line in report.lines(found)[:3]] == ["fault", "also:", "also:"]


def test_a_fault_of_one_step_says_in_which(base):
    found = localize(
        base(steps=4), job({("up", 1): lambda x, s: x * (2 if s == 2 else 1)}, steps=4)
    )
    assert [one.place.step for one in found.found.faults] == [2]
    assert ", in step 2 of 0-3: " in report.verdict(found)
    every = localize(found.run.path, job({("up", 1): lambda x: 2 * x}, steps=4))
    assert ", in every step: " in report.verdict(every)
    assert len(report.rows(every, 12)) == 12 and report.rows(every, 12)[0]["steps"] == "0-3"


def test_a_fault_of_one_occurrence_says_at_which(run, capsys):
    """As without a step(): iterations that nothing but their number tells apart."""
    draws = torch.randn(4, 3, 8, 16, generator=torch.Generator().manual_seed(0))

    def target(wrong=None):
        kept = []
        for time, layers in enumerate(draws):
            for layer, x in enumerate(layers):
                kept.append(tap("x", x * (2 if (time, layer) == wrong else 1), layer=layer))
        return kept

    with Recorder(run):
        target()
    found = localize(run, lambda: target((2, 1)))
    assert report.verdict(found).startswith("fault: x layer=1 (from x layer=0), at occurrence 2 of")
    report.print_found(found, 80, 4, everything=False)
    header, first, *_ = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.split()[:3] == ["segment", "from", "occ"] and first.split()[3] == "2"


def test_a_wrong_parameter_comes_before_all_that_it_spoils(run):
    def train(factor=1.0, also=1.0):
        w = torch.nn.Parameter(factor * torch.arange(1.0, 65).view(8, 8))
        x = tap("x", torch.ones(4, 8) * also)
        weight = tap("w", w)
        tap("y", x @ weight)

    with Recorder(run):
        train()
    found = localize(run, lambda: train(2.0, 3.0))
    assert named(found) == [("w", None), ("x", None)]
    assert found.found.faults[0].is_weight
    assert "loads, converts or updates the parameter w" in report.lines(found)[-1]
    assert found.segments.filter(found.segments["name"] == "y")["begins"].to_list() == [["x"]]


def test_what_is_not_finite_is_a_fault(base):
    def broken(x):
        x = x.clone()
        x[0, 3, 5] = torch.nan
        return x

    found = localize(base(), job({("up", 2): broken}))
    assert named(found) == [("up", 2)]
    assert "1 element NaN or infinite on one side alone" in found.found.faults[0].class_.evidence
    json.loads(report.as_json(found))


def test_a_tap_without_a_record_cuts_nothing_and_is_said(run):
    def target(factor, extra):
        x = tap("a", torch.ones(4, 8))
        x = x * factor
        if extra:
            x = tap("between", x)
        tap("b", x + 1)

    with Recorder(run):
        target(1.0, False)
    found = localize(run, lambda: target(3.0, True))
    assert named(found) == [("b", None)] and found.found.faults[0].names == ["a"]
    assert [one.place.name for one in found.found.not_judged] == ["between"]
    assert any("1 tap had no record and cut nothing" in note for note in found.found.notes)
    assert localize(run, lambda: target(1.0, True)).status == 0


def test_another_shape_is_not_judged_and_not_taken_for_right(run):
    def target(size, factor=1.0):
        tap("a", torch.ones(size))
        tap("b", torch.ones(4) * factor)

    with Recorder(run):
        target(4)
    found = localize(run, lambda: target(5))
    assert found.status == 3 and "a was not judged" in found.problems[0]
    assert "[5]" in found.found.not_judged[0].why
    assert localize(run, lambda: target(5, 2.0)).status == 1


def test_nothing_grafted_is_no_result(base):
    found = localize(base(), lambda: tap("other", torch.ones(3)))
    assert found.status == 3 and "nothing was grafted" in found.problems[0]
    assert report.verdict(found) == "no segment was judged"


def test_the_last_tap_is_judged_although_nobody_keeps_it(run):
    def target(factor):
        x = tap("a", torch.ones(4, 8))
        tap("b", x * factor)

    with Recorder(run):
        target(1.0)
    assert named(localize(run, lambda: target(2.0))) == [("b", None)]


def test_grafts_that_do_nothing_are_found_out(base):
    """The target taps copies, and goes on with what it computed itself: all is off."""

    def target():
        random = torch.Generator().manual_seed(0)
        weights = torch.randn(LAYERS, 2, WIDTH, WIDTH, generator=random) / WIDTH**0.5
        x = 1.5 * torch.randn(2, 12, WIDTH, generator=random)
        kept = [tap("x", x.clone(), dims="b s w")]
        for layer, (up, down) in enumerate(weights):
            x = torch.tanh(x @ up)
            kept.append(tap("up", x.clone(), dims="b s w", layer=layer))
            x = x @ down
            kept.append(tap("down", x.clone(), dims="b s w", layer=layer))
        kept.append(tap("out", x.sum(-1), dims="b s"))

    found = localize(base(), target)
    assert found.status == 3 and "grafts have no effect" in found.problems[0]


def test_a_value_that_differs_is_told(run):
    def target(value):
        tap("scale", value)
        tap("x", torch.ones(3))

    with Recorder(run):
        target(0.5)
    found = localize(run, lambda: target(0.25))
    (one,) = found.found.not_judged
    assert "recorded 0.5, here 0.25" in one.why and found.status == 3
    assert localize(run, lambda: target(0.5)).status == 0


def test_a_floor_and_a_truth_raise_limits_and_never_lower_them(base, tmp_path):
    noise = {
        ("up", 2): lambda x: x * (1 + 1e-4 * torch.randn(x.shape, generator=torch.Generator()))
    }
    right, off = base(), job(noise)
    assert named(localize(right, off)) == [("up", 2)]
    check(right, off, out=tmp_path / "floor")
    floored = localize(right, off, floor=[tmp_path / "floor"])
    assert floored.status == 0 and floored.was_checked
    with Recorder(tmp_path / "second"):
        off()
    assert localize(right, off, floor=[tmp_path / "second"]).status == 0
    assert localize(right, off, truth=tmp_path / "second").status == 0
    scaled = job({("up", 2): lambda x: 1.5 * x})
    assert named(localize(right, scaled, floor=[tmp_path / "floor"])) == [("up", 2)]
    check(right, job(), out=tmp_path / "clean")
    assert localize(right, job(), floor=[tmp_path / "clean"]).status == 0


def test_what_differs_between_repeats_is_noise(base):
    found = localize(base(), job({("up", 2): lambda x: x * torch.rand(x.shape)}), repeat=2)
    assert found.found.faults[0].class_.word == "noise"
    with pytest.raises(UsageError, match="repeat is 0"):
        localize(found.run.path, job(), repeat=0)


def test_options_are_those_of_a_replay(base):
    right = base()
    found = localize(right, job({("up", 2): lambda x: 2 * x}), filter="layer != 2")
    assert found.status == 1 and named(found) == [("up", 3)]
    with pytest.raises(UsageError, match="'match' is no option; there is match_on"):
        localize(right, job(), match="name")
    with pytest.raises(RecordingError):
        localize(right.with_name("nothing"), job())


def test_a_log_without_own_errors_says_so(base, tmp_path):
    with Replayer(base(), out=tmp_path / "plain"):
        job()()
    found = located(read_log(tmp_path / "plain"))
    assert not found.segments and len(found.not_judged) == 12


def test_only_a_check_of_this_recording_is_a_floor(base, tmp_path):
    """The log of the faulty target would hide the very fault."""
    wrong = job({("up", 2): lambda x: x.abs()})
    run = base()
    localize(run, wrong, out=tmp_path / "log")
    with pytest.raises(RecordingError, match="no check of .*; make the floor with graft check"):
        localize(run, wrong, floor=[tmp_path / "log"])
    with Recorder(tmp_path / "another"):
        job()()
    check(tmp_path / "another", job(), out=tmp_path / "check")
    with pytest.raises(RecordingError, match="no check of"):
        localize(run, wrong, floor=[tmp_path / "check"])


def test_infinities_of_a_mask_make_no_value_stale(run):
    masked = torch.ones(16, 16, dtype=torch.bool).triu(1)
    scores = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))

    def target(factor):
        for i, one in enumerate(scores):
            tap(
                "scores", (one * (factor if i == 2 else 1)).masked_fill(masked, -torch.inf), layer=i
            )

    with Recorder(run):
        target(1.0)
    (fault,) = localize(run, lambda: target(1.4)).found.faults
    assert (fault.class_.word, fault.class_.factor) == ("scaled", pytest.approx(1.4, rel=1e-3))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (8, 1), (6, 3)])
def test_few_numbers_that_cancel_are_no_fault(run, shape):
    random = torch.Generator().manual_seed(0)
    pairs = torch.randn(40, 2, *shape, generator=random)

    def target(rounding):
        kept = [tap("y", a + 2e-7 * rounding * b, layer=i) for i, (a, b) in enumerate(pairs)]
        return len(kept)

    with Recorder(run):
        target(0.0)
    assert localize(run, lambda: target(1.0)).status == 0


@pytest.mark.processes
def test_a_run_that_ended_early_is_not_called_right(base, shell):
    ends = f"import sys; sys.path.append({str(Path(layered.__file__).parent)!r}); import layered"
    found = localize(base(), [*shell.python, "-c", f"{ends}; layered.job()(); sys.exit(7)"])
    assert found.status == 7
    assert report.verdict(found) == "no fault before COMMAND ended with 7"


def test_a_log_of_the_version_before_is_read(base, tmp_path):
    with Replayer(base(), out=tmp_path / "plain"):
        job()()
    (path,) = (tmp_path / "plain" / "grafts").glob("*.parquet")
    log = read_log(tmp_path / "plain")
    log.drop(*OF_OWN_ERROR).write_parquet(path)
    again = read_log(tmp_path / "plain")
    assert list(again.columns) == list(COLUMNS) and again.equals(log)


def test_near_ties_are_rounding_and_other_choices_are_not(run):
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    third = scores.argsort(1, descending=True)[:, 2]
    scores[5, third[5]] = scores[5].topk(2).values[1] - 1e-6

    def target(change):
        kept = tap("scores", scores.clone(), layer=0)
        tap("chosen", change(scores.topk(2).indices), layer=0)
        return kept

    def other(row):
        def change(chosen):
            chosen = chosen.clone()
            chosen[row, 1] = third[row]
            return chosen

        return change

    with Recorder(run):
        target(lambda chosen: chosen)
    assert localize(run, lambda: target(lambda chosen: chosen.flip(1))).status == 0
    assert localize(run, lambda: target(other(5))).status == 0
    found = localize(run, lambda: target(other(6)))
    assert named(found) == [("chosen", 0)]
    assert "1 of 64 rows are another choice, 0 of them near ties" in report.verdict(found)


def test_without_scores_a_few_other_choices_are_not_judged(run):
    chosen = torch.randint(8, (64, 2), generator=torch.Generator().manual_seed(3))

    def target(rows):
        tap("x", torch.ones(3))
        tap("chosen", torch.where(torch.arange(64)[:, None] < rows, (chosen + 1) % 8, chosen))

    with Recorder(run):
        target(0)
    few, many = (localize(run, lambda n=n: target(n)) for n in (2, 40))
    assert few.status == 3 and "tap the scores before it" in few.found.not_judged[0].why
    assert many.status == 1


def test_the_table_fits_a_terminal_and_the_json_is_whole(base, capsys):
    found = localize(base(), job({("up", 2): lambda x: 2 * x}))
    report.print_found(found, 80, 4, everything=True)
    printed = capsys.readouterr().out
    table = printed.split("\n\n")[1].splitlines()
    assert len(table) == 6 and max(map(len, table)) <= 80 and "8 more segments" in table[-1]
    told = json.loads(report.as_json(found))
    first = told["segments"][0]
    assert first["name"] == "up" and first["tags"] == {"layer": 2} and first["rank"] == [0]
    assert first["from"] == ["down"] and first["fault"] is True and first["class"] == "scaled"
    assert first["factor"] == pytest.approx(2) and first["error"] == pytest.approx(1)
    assert 0 < first["expected"] < 1e-5 and first["evidence"].startswith("the target's values")
    assert told["status"] == 1 and told["not_judged"] == [] and len(told["segments"]) == 12
    assert not any(one["fault"] for one in told["segments"][1:])


def test_a_run_in_fewer_bits_is_said_once(run):
    """TF32 by truncation, whose errors all have one direction, beside taps that have none."""

    def narrow(x):
        return (x.view(torch.int32) & -8192).view(torch.float32)

    def target(of, wrong=1.0):
        random = torch.Generator().manual_seed(0)
        kept = []
        x = torch.randn(24, 32, generator=random)
        for layer in range(4):
            w = torch.randn(4, 32, 32, generator=random) / 32**0.5
            up = tap("up", of(x) @ of(w[0]), layer=layer)
            gate = tap("gate", of(x) @ of(w[1]), layer=layer)
            mixed = tap("mixed", torch.tanh(up) * gate, layer=layer)
            down = tap("down", x + of(mixed) @ of(w[2]), layer=layer)
            x = tap(
                "x",
                down / down.norm(dim=-1, keepdim=True) * (wrong if layer == 2 else 1),
                layer=layer,
            )
            kept.append(x)
        return kept

    with Recorder(run):
        target(lambda t: t)
    found = localize(run, lambda: target(narrow))
    assert found.status == 0 and not found.found.faults
    assert "computes in fewer bits" in " ".join(found.found.notes)
    wrong = localize(run, lambda: target(narrow, 1.01))
    assert named(wrong) == [("x", 2)]


@pytest.mark.parametrize("is_dotted", [False, True])
@pytest.mark.parametrize("cast", [("q",), ("q", "k", "v")])
def test_kinds_that_are_cast_in_all_layers_are_faults_of_their_own(run, is_dotted, cast):
    """Others are equal bit for bit; the layer is a tag, or part of the name."""

    def target(cast=()):
        random = torch.Generator().manual_seed(0)
        x, kept = torch.randn(24, 32, generator=random), []
        for layer in range(4):
            for name in ("q", "k", "v", "up", "down", "out"):
                y = x @ torch.randn(32, 32, generator=random) / 32**0.5
                y = y.bfloat16().float() if name in cast else y
                where = {} if is_dotted else {"layer": layer}
                kept.append(tap(f"layers.{layer}.{name}" if is_dotted else name, y, **where))
        return kept

    with Recorder(run):
        target()
    found = localize(run, lambda: target(cast))
    assert len(found.found.faults) == 4 * len(cast) and found.status == 1
    assert {one.class_.word for one in found.found.faults} == {"low precision"}


def test_taps_and_records_that_do_not_meet_are_no_clean_result(run):
    def target(last, extra=False):
        kept = [tap("x", torch.ones(4, 8), layer=i) for i in range(3)]
        kept.append(tap(last, torch.ones(4, 8)))
        if extra:
            kept.append(tap("more", torch.ones(2)))
        return kept

    with Recorder(run):
        target("logits")
    found = localize(run, lambda: target("logitz"))
    assert found.status == 3 and "1 record was never used, such as logits" in found.problems[0]
    assert localize(run, lambda: target("logits", extra=True)).status == 0
    assert localize(run, lambda: target("logits", extra=True), strict=True).status == 3
    left_out = localize(run, lambda: target("logits"), filter="layer != 1")
    assert left_out.status == 0 and any("--filter left taps out" in one for one in left_out.notes)


def test_what_is_given_in_the_wrong_form_is_said(base, tmp_path):
    run = base()
    with pytest.raises(UsageError, match=r"give its words: \['python', 'job.py'\]"):
        localize(run, "python job.py")
    with pytest.raises(UsageError, match="the recording is a function; it comes first"):
        localize(job(), run)
    with Recorder(tmp_path / "other"):
        tap("nothing of it", torch.ones(2))
    for wrong in ({"floor": tmp_path / "other"}, {"truth": tmp_path / "other"}):
        with pytest.raises(RecordingError, match="has none of the taps of"):
            localize(run, job(), **wrong)


def test_integers_of_a_parameter_are_no_choice(run):
    codes = torch.randint(-128, 128, (64, 16), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )

    def target(weight):
        tap("codes", torch.nn.Parameter(weight, requires_grad=False))
        tap("y", weight.float())

    with Recorder(run):
        target(codes)
    wrong = codes.clone()
    wrong[7, 3] += 1
    first = localize(run, lambda: target(wrong)).found.faults[0]
    assert first.place.name == "codes" and first.is_weight
    assert first.class_.evidence == "1 of 64 rows have other integers; the first is row 7"


@pytest.mark.parametrize(
    ("change", "word", "said"),
    [
        (lambda x: torch.zeros_like(x), "zeros", "are zero where the baseline's are not"),
        (lambda x: torch.full_like(x, 0.5), "unknown", "are all 0.5 wherever"),
        (lambda x: x * (torch.arange(24)[:, None] >= 9), "zeros", "zero"),
        (lambda x: x * torch.ones(32).index_fill(0, torch.tensor(5), 0.0), "zeros", "zero"),
    ],
)
def test_zeros_and_constants_are_called_what_they_are(run, change, word, said):
    pairs = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(0))

    def target(change):
        return [tap("y", change(x) if i == 1 else 1 * x, layer=i) for i, x in enumerate(pairs)]

    with Recorder(run):
        target(lambda x: 1 * x)
    (fault,) = localize(run, lambda: target(change)).found.faults
    assert fault.class_.word == word and said in fault.class_.evidence


def test_markdown_has_the_verdict_the_versions_and_both_commands(base):
    found = localize(base(), job({("up", 2): lambda x: 2 * x}))
    text = report.markdown(found)
    assert text.startswith("**fault: up layer=2")
    assert "| baseline |" in text and "graft localize" in text and "graft record" in text
    rows = [
        line for line in text.splitlines() if line.startswith("| up") or line.startswith("| down")
    ]
    assert len(rows) <= 12


def test_frames_have_the_columns_they_say(base):
    found = localize(base(), job({("up", 2): lambda x: 2 * x}))
    assert found.segments.height == 12 and found.segments["fault"].sum() == 1
    assert found.segments["name"][0] == "up"
