"""A layout's error: a fact, apart an advice, and sides that whoever shows it may name."""

from __future__ import annotations

from recorder.errors import BlocksMissing, LayoutError

FACT = "$senders hold it by tp, $sender 1 and $rank 3 do not, and $receiver wants it"


def test_sides_have_usual_names_until_they_are_named():
    assert str(LayoutError(FACT)) == (
        "the senders hold it by tp, sender 1 and sender rank 3 do not, and the target wants it"
    )
    sides = {"senders": "A's ranks", "sender": "A's rank", "rank": "A rank", "receiver": "B"}
    assert str(LayoutError(FACT).of("x", sides)) == (
        "x: A's ranks hold it by tp, A's rank 1 and A rank 3 do not, and B wants it"
    )


def test_who_names_the_place_keeps_the_kind_and_the_advice():
    error = BlocksMissing("block 1 is missing").of("x layer=0").of("step 3")
    assert type(error) is BlocksMissing
    assert str(error) == "step 3: x layer=0: block 1 is missing; record all ranks"
    assert (error.of("").fact, error.advice) == (error.fact, "record all ranks")


def test_text_of_a_user_with_a_dollar_stays():
    assert str(LayoutError("dim $h of $ 5").of("$x")) == "$x: dim $h of $ 5"
