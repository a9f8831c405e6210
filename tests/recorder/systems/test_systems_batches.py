"""Rows of transformers' models: each token's id, however it was padded, cached or reordered."""

from __future__ import annotations

import copy
import gc
import re
import threading

import pytest
import token_oracle as oracle
import torch
from following import (
    beside,
    followed,
    needs_transformers,
    padded,
    recording,
    tiny,
)
from torch import nn

from recorder import Recorder, Recording, attach, follow_rows, rows, tap, token_rows
from recorder.errors import UsageError
from recorder.systems import caches
from recorder.taps.around import rows_around
from recorder.tokens.known import known_of

pytestmark = needs_transformers

PROMPTS = [[5, 6, 7], [3, 4, 5, 6, 7, 9], [8]]
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def bert():
    return tiny("BertModel")


def ids(seen, n=-1):
    return seen[n].get("b s")


def generated(model, prompts, **options):
    """Generate from prompts padded on the left; return each one's whole sequence."""
    tokens, mask = padded(prompts)
    out = model.generate(tokens, attention_mask=mask, **{**GREEDY, **options})
    width = tokens.shape[1]
    many = len(out) // len(prompts)
    return [
        prompts[i // many] + row[width:].tolist() for i, row in enumerate(out)
    ]  # fmt: skip


def test_prompts_padded_on_the_left_and_each_token_after_them(tmp_path, model):
    with followed(tmp_path, model, at=model.model.layers[1]) as seen:
        whole = generated(model, PROMPTS, max_new_tokens=5)
    assert len(seen) == 5
    assert ids(seen, 0) == beside(PROMPTS)
    for n in range(1, 5):
        assert ids(seen, n) == [
            oracle.ids(row[: len(p) + n])[-1:] for row, p in zip(whole, PROMPTS, strict=True)
        ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["by name", "by position", "bools"])
def test_a_padded_batch(tmp_path, model, side, how):
    tokens, mask = padded(PROMPTS, side)
    with followed(tmp_path, model) as seen:
        if how == "by name":
            model(attention_mask=mask, input_ids=tokens)
        else:
            model(tokens, mask.bool() if how == "bools" else mask)
    assert ids(seen) == beside(PROMPTS, side)


def test_what_is_known_of_ids_goes_with_them(tmp_path, model):
    found = []
    tokens, mask = padded(PROMPTS)
    handle = model.model.norm.register_forward_hook(
        lambda *_: found.append(known_of(rows_around()[0].of()))
    )
    with followed(tmp_path, model):
        model(tokens, mask)
    handle.remove()
    assert found[0].tokens.tolist() == torch.where(mask == 1, tokens, -1).tolist()
    assert found[0].positions[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_head_has_the_last_tokens(tmp_path, model):
    tokens, mask = padded(PROMPTS)
    for keep, at in [
        (1, slice(-1, None)), (3, slice(-3, None)), (0, slice(None)), (torch.tensor([5, 2]), [5, 2])
    ]:  # fmt: skip
        with followed(tmp_path, model, at=model.lm_head) as seen:
            model(tokens, mask, logits_to_keep=keep)
        expected = torch.tensor(beside(PROMPTS))[:, at]
        assert ids(seen) == expected.tolist()


def test_what_comes_after_the_head_has_its_rows(tmp_path, model):
    tokens, mask = padded(PROMPTS)
    table = tmp_path / "t.toml"
    table.write_text('[taps]\n":output.logits" = { tap = "logits", dims = "b s v" }\n')
    with Recorder(tmp_path / "r"), attach(model, taps=str(table), rows="auto"):
        model(tokens, mask, logits_to_keep=2)
    run = Recording.open(tmp_path / "r")
    assert [run.ids(r)[0].ids.tolist() for r in records(run)] == [
        [row[-2:] for row in beside(PROMPTS)]
    ]


def test_a_head_that_gets_tokens_in_one_has_no_rows(tmp_path, model):
    tokens, mask = padded(PROMPTS)
    with followed(tmp_path, model, at=model.lm_head) as seen:
        model(tokens, mask, logits_to_keep=mask.bool())
    assert seen == [{}]


def test_beams_take_their_prefixes_along(tmp_path, model):
    """With a cache, rows are reordered in it; without, each forward has all tokens."""
    options = {"max_new_tokens": 6, "num_beams": 3}
    with followed(tmp_path, model, at=model.model.norm) as cached:
        with_cache = generated(model, PROMPTS, **options)
    with followed(tmp_path, model, at=model.model.norm) as whole:
        without = generated(model, PROMPTS, **options, use_cache=False)
    assert with_cache == without and len(cached) == len(whole) == 6
    for one, other in zip(cached, whole, strict=True):
        assert [row[-1] for row in ids([one])] == [row[-1] for row in ids([other])]
        assert all(row[-1] != -1 for row in ids([one]))
    moved = [row[-1] for one in cached[2:] for row in ids([one])]
    assert len(set(moved)) > len(moved) // 2  # beams are not all alike


class Followed1:
    """Follows one sequence in a cache by itself: what it held at each forward of a model."""

    def __init__(self, model):
        self.model, self.tokens, self.due = model, [], []

    def __enter__(self):
        def before(module, args, kwargs):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            begin = 0 if cache is None else int(cache.get_seq_length())
            given = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.tokens = self.tokens[:begin] + given[0].tolist()
            self.due.append([oracle.ids(self.tokens)[begin:]])

        self.handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        return self.due

    def __exit__(self, *error):
        self.handle.remove()


def test_tokens_that_were_drafted_and_rejected(tmp_path, model):
    prompt = [[5, 6, 7, 5, 6, 7, 5, 6]]
    with followed(tmp_path, model, at=model.model.norm) as seen, Followed1(model) as due:
        generated(model, prompt, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert [ids([one]) for one in seen] == due
    assert any(len(one[0]) > 1 for one in due[1:])  # drafts there were


def test_an_assistant_has_rows_of_its_own(tmp_path, model):
    assistant = tiny(seed=1, num_hidden_layers=1)
    both = nn.ModuleDict({"model": model, "assistant": assistant})
    with recording(tmp_path), follow_rows(both):
        seen = {one: [] for one in both.values()}
        handles = [
            one.model.norm.register_forward_hook(
                lambda *_, one=one: seen[one].append(rows_around()[0].taken().ids.tolist())
            )
            for one in both.values()
        ]
        with Followed1(model) as due, Followed1(assistant) as drafts:
            generated(model, [[5, 6, 7]], max_new_tokens=8, assistant_model=assistant)
        for handle in handles:
            handle.remove()
    assert seen[model] == due and seen[assistant] == drafts and drafts


def test_a_static_cache(tmp_path, model):
    with followed(tmp_path, model, at=model.model.norm) as seen:
        whole = generated(model, PROMPTS, max_new_tokens=5, cache_implementation="static")
    assert ids(seen, 0) == beside(PROMPTS)
    last = [oracle.ids(row)[-2] for row in whole]
    assert ids(seen, 4) == [[one] for one in last]


def caches_of(kind, model):
    import transformers

    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=32)
    return transformers.DynamicCache(config=model.config)


def test_a_static_cache_that_is_used_again(tmp_path, model):
    cache = caches_of("static", model)
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7]])
    with torch.no_grad(), followed(tmp_path, model) as seen:
        model(first, cache=cache)
        model(torch.tensor([[4]]), cache=cache)
        cache.reset()
        model(second, cache=cache)
        model(torch.tensor([[4]]), cache=cache)
    assert [ids([one]) for one in seen] == [
        [oracle.ids([5, 6, 7])], [oracle.ids([5, 6, 7, 4])[-1:]],
        [oracle.ids([9, 8, 7])], [oracle.ids([9, 8, 7, 4])[-1:]],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_is_cropped_and_goes_on_otherwise(tmp_path, model, kind, mode):
    with mode(), followed(tmp_path, model) as seen:
        cache = caches_of(kind, model)
        model(torch.tensor([[5, 6, 7, 8]]), cache=cache)
        cache.crop(-2)
        model(torch.tensor([[1, 2]]), cache=cache)
        model(torch.tensor([[3]]), cache=cache)
    assert [ids([one])[0] for one in seen[1:]] == [
        oracle.ids([5, 6, 1, 2])[2:], oracle.ids([5, 6, 1, 2, 3])[4:]
    ]  # fmt: skip


def test_rows_of_a_cache_that_are_chosen_or_repeated(tmp_path, model):
    with torch.no_grad(), followed(tmp_path, model) as seen:
        cache = caches_of("dynamic", model)
        model(torch.tensor([[5, 6], [7, 8], [9, 1]]), cache=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        model(torch.tensor([[1], [2], [3], [4]]), cache=cache)
    whole = [[9, 1, 1], [9, 1, 2], [5, 6, 3], [5, 6, 4]]
    assert ids(seen) == [oracle.ids(row)[-1:] for row in whole]


def test_a_cache_of_a_prompt_that_is_copied(tmp_path, model):
    with torch.no_grad(), followed(tmp_path, model) as seen:
        prompt = caches_of("dynamic", model)
        model(torch.tensor([[5, 6, 7]]), cache=prompt)
        for end in ([1, 2], [3]):
            model(torch.tensor([end]), cache=copy.deepcopy(prompt))
            assert ids(seen)[0] == oracle.ids([5, 6, 7, *end])[3:]


NEVER = "its cache begins with 3 tokens that were not seen here"


def test_a_cache_that_was_filled_before_gives_no_ids(tmp_path, model, capsys):
    cache = caches_of("dynamic", model)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), cache=cache)
        with followed(tmp_path, model) as seen:
            for _ in range(3):
                model(torch.tensor([[1]]), cache=cache)
    assert seen == [{}] * 3
    said = capsys.readouterr().err
    assert said.count(NEVER) == 1 and "start recording before it is filled" in said
    assert said.count("are not told apart") == 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_grew_while_nothing_recorded_gives_no_ids(tmp_path, model, kind, mode):
    """Not even where it is as long again as when it was last seen."""
    seen = []
    handle = model.model.norm.register_forward_hook(
        lambda *_: seen.append([one.taken().ids.tolist() for one in rows_around()])
    )
    with mode(), follow_rows(model):
        cache = caches_of(kind, model)
        with recording(tmp_path):
            model(torch.tensor([[5, 6, 7]]), cache=cache)
        cache.crop(-2)
        model(torch.tensor([[1, 2]]), cache=cache)
        with recording(tmp_path):
            model(torch.tensor([[4]]), cache=cache)
    handle.remove()
    assert seen[0] == [[oracle.ids([5, 6, 7])]] and seen[-1] == []


def test_a_cache_that_is_written_by_hand_gives_no_ids(tmp_path, model):
    with torch.no_grad(), followed(tmp_path, model) as seen:
        for spoil in (
            lambda layer: setattr(layer, "keys", layer.keys[..., torch.tensor([0, 2, 1]), :]),
            lambda layer: layer.keys.mul_(2),
        ):
            cache = caches_of("dynamic", model)
            model(torch.tensor([[5, 6, 7]]), cache=cache)
            spoil(cache.layers[1])
            model(torch.tensor([[1]]), cache=cache)
            assert seen[-1] == {}


def test_a_cache_that_the_model_made(tmp_path, model):
    with torch.no_grad(), followed(tmp_path, model) as seen:
        cache = model(torch.tensor([[5, 6, 7]])).cache
        cache = model(torch.tensor([[1]]), cache=cache, return_dict=False)[1]
        model(torch.tensor([[2]]), cache=cache)
    assert ids(seen) == [oracle.ids([5, 6, 7, 1, 2])[-1:]]


def test_a_mask_that_hides_what_was_seen_gives_no_ids_to_that_row(tmp_path, model, capsys):
    tokens, mask = padded([[5, 6, 7], [8, 9]])
    with torch.no_grad(), followed(tmp_path, model) as seen:
        cache = caches_of("dynamic", model)
        model(tokens, mask, cache=cache)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        mask[0, 1] = 0
        model(torch.tensor([[1], [2]]), mask, cache=cache)
        mask[0, 1] = 1
        model(torch.tensor([[1], [2]]), torch.cat([mask, mask[:, -1:]], 1), cache=cache)
    assert ids(seen, 1) == [[-1], oracle.ids([8, 9, 2])[-1:]]
    assert ids(seen, 2) == [[-1], oracle.ids([8, 9, 2, 2])[-1:]]
    assert capsys.readouterr().err.count("some rows have no ids") == 1


def test_a_padded_prompt_that_goes_on_without_a_mask_gives_no_ids_to_that_row(tmp_path, model):
    tokens, mask = padded([[5, 6, 7], [8, 9]])
    with torch.no_grad(), followed(tmp_path, model) as seen:
        cache = caches_of("dynamic", model)
        model(tokens, mask, cache=cache)
        model(torch.tensor([[1], [2]]), cache=cache)
    assert ids(seen) == [oracle.ids([5, 6, 7, 1])[-1:], [-1]]


def test_a_buffer_of_tokens_that_is_used_again(tmp_path, model):
    """Ids are asked for after the job has filled the buffer with the next tokens."""
    buffer = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(buffer)

    class Refills(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, mask)

    def refill(*_):
        buffer.copy_(torch.tensor([[1, 2, 3]]))
        mask.zero_()

    handle = model.model.embed_tokens.register_forward_hook(refill)
    with followed(tmp_path, model, at=model.model.norm) as seen:
        Refills()(buffer)
    handle.remove()
    assert ids(seen) == [oracle.ids([5, 6, 7])]


def test_two_models_in_turn(tmp_path, model):
    other = tiny(seed=1)
    both = nn.ModuleList([model, other])
    seen = []
    handles = [
        one.model.norm.register_forward_hook(
            lambda *_: seen.append(rows_around()[0].taken().ids.tolist())
        )
        for one in both
    ]
    with torch.no_grad(), recording(tmp_path), follow_rows(both):
        a, b = (caches_of("dynamic", one) for one in both)
        model(torch.tensor([[5, 6, 7]]), cache=a)
        other(torch.tensor([[1, 2]]), cache=b)
        model(torch.tensor([[8]]), cache=a)
        other(torch.tensor([[8]]), cache=b)
    for handle in handles:
        handle.remove()
    assert seen[2:] == [[oracle.ids([5, 6, 7, 8])[-1:]], [oracle.ids([1, 2, 8])[-1:]]]


def test_sequences_that_lie_in_one_row(tmp_path, model):
    tokens, places = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    with followed(tmp_path, model) as seen:
        model(tokens, position_ids=places, use_cache=False)
    assert ids(seen) == [oracle.ids([5, 6, 7]) + oracle.ids([8, 9])]


def test_positions_that_begin_again_where_attention_goes_across_give_no_ids(
    tmp_path, model, capsys
):
    tokens, places = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    with followed(tmp_path, model) as seen:
        model(tokens, position_ids=places)  # it makes a cache, and no mask for each sequence
        model(tokens, torch.ones_like(tokens), position_ids=places, use_cache=False)
    assert seen[0] == {} and ids(seen, 1) == [[-1] * 5]
    assert "its position_ids begin again within a row" in capsys.readouterr().err


def test_the_part_of_a_sequence_that_another_rank_begins_gives_no_ids(tmp_path, model, capsys):
    tokens, places = torch.tensor([[5, 6, 7]]), torch.tensor([[3, 4, 5]])
    with followed(tmp_path, model) as seen:
        model(tokens, position_ids=places)
    assert ids(seen) == [[-1] * 3]
    assert "their mask, positions, types or cache are not those of tokens" in (
        capsys.readouterr().err
    )


def masks(count, real):
    ahead = torch.ones(count, count, dtype=torch.bool).triu(1)
    return (real[:, None, None, :] & ~ahead).clone()


@pytest.mark.parametrize("form", ["bools", "scores"])
def test_a_mask_of_tokens_by_tokens(tmp_path, model, form):
    tokens, mask = padded([[5, 6, 7], [8, 9]])
    sees = masks(3, mask.bool())
    sees[1, 0, 0] = True  # padding may see what it likes
    of_a_tree = masks(3, mask.bool())
    of_a_tree[0, 0, 1, 0] = False
    with followed(tmp_path, model) as seen:
        for one in (sees, of_a_tree):
            scores = torch.where(one, 0.0, torch.finfo(torch.float32).min)
            model(tokens, attention_mask=one if form == "bools" else scores)
    assert ids(seen, 0) == beside([[5, 6, 7], [8, 9]])
    assert ids(seen, 1) == [[-1] * 3, beside([[5, 6, 7], [8, 9]])[1]]


def test_numbers_in_a_mask_that_mean_something_else_give_no_ids(tmp_path, model):
    with followed(tmp_path, model) as seen:
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.tensor([[1, 1, 2]]))
    assert ids(seen) == [[-1] * 3]


WORDS = "it is given embeddings and no tokens; say which row is which by a function"


def test_embeddings_alone_give_no_ids(tmp_path, model, capsys):
    embeds = model.model.embed_tokens(torch.tensor([[5, 6, 7]])).detach()
    with followed(tmp_path, model, at=model.model.norm) as seen:
        model(torch.tensor([[1, 2, 3]]))
        for _ in range(2):
            model(inputs_embeds=embeds)
    assert seen[1:] == [{}, {}] and capsys.readouterr().err.count(WORDS) == 1


class Images(nn.Module):
    """As models of texts and images are made: tokens stand for images that they do not say."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, cache=None):
        embeds = self.model.model.embed_tokens(input_ids)
        if pixel_values is not None:
            embeds = embeds + pixel_values
        return self.model(inputs_embeds=embeds, attention_mask=attention_mask, cache=cache)


def test_images_give_no_ids_and_texts_have_theirs(tmp_path, model, capsys):
    outer = Images(model)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), recording(tmp_path), follow_rows(outer, "transformers") as _:
        seen = []
        handle = model.model.norm.register_forward_hook(
            lambda *_: seen.append([one.taken().ids.tolist() for one in rows_around()])
        )
        cache = caches_of("dynamic", model)
        outer(tokens, pixel_values=torch.ones(1, 3, 16), cache=cache)
        outer(torch.tensor([[1]]), cache=cache)
        handle.remove()
    assert seen == [[], []]
    said = capsys.readouterr().err
    assert "it is given embeddings" in said or "it is given pixel_values" in said


def test_rows_of_bert_are_those_of_the_whole_sequence(tmp_path, bert):
    """Equal beginnings are other rows where the ends differ, and the same whatever the padding."""
    rows_of = [[5, 6, 7, 8], [5, 6, 7], [5, 6, 9]]
    found = {}
    for side in ("left", "right"):
        tokens, mask = padded(rows_of, side)
        with followed(tmp_path, bert, at=bert.encoder) as seen:
            bert(tokens, mask)
        found[side] = [[one for one in row if one != -1] for row in ids(seen)]
    assert found["left"] == found["right"]
    assert len({one for row in found["left"] for one in row}) == 10
    whole = [oracle.ids(row)[-1] for row in rows_of]
    assert found["left"] == [oracle.ids(r, salt) for r, salt in zip(rows_of, whole, strict=True)]
    tokens, mask = padded(rows_of)
    same = token_rows(tokens, attention_mask=mask, salt=whole)
    assert [[i for i in row if i != -1] for row in same.tolist()] == found["left"]


def test_types_of_tokens_are_part_of_rows_of_bert(tmp_path, bert):
    tokens = torch.tensor([[5, 6, 7, 8]] * 3)
    types = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
    with followed(tmp_path, bert, at=bert.encoder) as seen:
        bert(tokens, token_type_ids=types)
        bert(tokens[:1], token_type_ids=types[:1])
        bert(tokens[:1])
        bert(tokens[:1], token_type_ids=types[1:2])
    every = ids(seen, 0)
    assert len({one for row in every for one in row}) == 12
    assert ids(seen, 1) == ids(seen, 2) == every[:1] and ids(seen, 3) == every[1:2]


def test_a_model_of_which_nothing_is_recognised(tmp_path, capsys):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, input_ids):
            return self.inner(input_ids.float())

    own = Own()
    with pytest.raises(UsageError, match=r"the models seen are Own; transformers, vllm and sglang"):
        follow_rows(own)
    assert not own._forward_pre_hooks
    with Recorder(tmp_path / "r", rows="auto"):
        own(torch.tensor([[1, 2]]))
    said = capsys.readouterr().err
    # Among others, where a test before left some, as the compiler keeps those that it has seen.
    assert re.search("--rows auto: no row is told from another: the models seen are .*Own", said)
    with followed(tmp_path, own, "transformers", at=own.inner) as seen:  # said to be one
        own(torch.tensor([[1, 2]]))
    assert len(ids(seen)[0]) == 2


@pytest.mark.parametrize("rows_by", ["auot", "", "nodots", 3])
def test_a_system_that_is_not_known(tmp_path, model, rows_by):
    with pytest.raises(
        UsageError, match="rows is .*; give one of auto, transformers, vllm, sglang"
    ):
        follow_rows(model, rows_by)
    with pytest.raises(UsageError, match="give one of auto, transformers, vllm, sglang"):
        Recorder(tmp_path / "r", rows=rows_by)


def test_ids_hold_while_the_model_runs_and_no_longer(tmp_path, model):
    with recording(tmp_path), follow_rows(model):
        assert rows_around() == ()
        model(torch.tensor([[5, 6, 7]]))
        assert rows_around() == ()
        model.lm_head(torch.zeros(1, 3, 16))


def test_ids_do_not_hold_once_a_model_has_raised(tmp_path, model):
    with recording(tmp_path), follow_rows(model):
        with pytest.raises(IndexError):
            model(torch.tensor([[500]]))
        assert rows_around() == ()


def test_a_forward_that_was_interrupted_is_given_up(tmp_path, model):
    """No hook hears of an interrupt: the next call is none within that one."""
    seen = []
    handle = model.model.norm.register_forward_hook(
        lambda *_: seen.append([one.taken().ids.tolist() for one in rows_around()])
    )
    tokens = torch.tensor([[5, 6, 7]])

    def interrupt(*_):
        raise KeyboardInterrupt

    with recording(tmp_path), follow_rows(model):
        for at in (model.model.layers[1], model.lm_head):
            stop = at.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(tokens)
            stop.remove()
            tokens.add_(1)  # and the same tensors are given once more
            model(tokens)
            assert rows_around() == ()
        stop = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
        stop.remove()
    handle.remove()
    due = [[6, 7, 8], [6, 7, 8], [7, 8, 9], [7, 8, 9]]  # the second at the head alone
    assert seen == [[[oracle.ids(one)]] for one in due]
    with recording(tmp_path):
        assert rows_around() == ()


def test_a_state_that_is_no_cache_gives_no_ids(tmp_path, model, capsys):
    class Recurrent(type(model)):
        def forward(self, input_ids=None, cache_params=None):
            return self.model.embed_tokens(input_ids)

    recurrent = Recurrent(model.config)
    with followed(tmp_path, recurrent, at=recurrent.model.embed_tokens) as seen:
        recurrent(torch.tensor([[5, 6]]))
        recurrent(torch.tensor([[7]]), cache_params=object())
    assert seen == [{"b s": [oracle.ids([5, 6])]}, {}]
    assert "it goes on from its cache_params" in capsys.readouterr().err


def test_ids_of_a_block_hold_before_those_of_the_calls(tmp_path, model):
    with followed(tmp_path, model) as seen:
        with rows({"b s": [[1, 2, 3]]}):
            model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[5, 6, 7]]))
    assert [ids([one]) for one in seen] == [[[1, 2, 3]], [oracle.ids([5, 6, 7])]]


def test_blocks_are_left_in_order_around_calls(tmp_path, model, capsys):
    with recording(tmp_path), follow_rows(model), rows(t=[1]):
        model(torch.tensor([[5, 6, 7]]))
        tap("x", torch.zeros(1), dims="t")
    assert capsys.readouterr().err == ""


def test_hand_written_taps_have_rows_by_the_option_alone(tmp_path, model, monkeypatch):
    """In the model's own code, of which no table is told."""

    plain = type(model.model.norm).forward

    def forward(self, x):
        return tap("normed", plain(self, x), dims="b s h")

    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    tokens, mask = padded(PROMPTS)
    with Recorder(tmp_path / "r", rows="auto"):
        model(tokens, mask)
    run = Recording.open(tmp_path / "r")
    found = {r["name"]: run.ids(r)[0].ids.tolist() for r in records(run)}
    assert found == {"normed": beside(PROMPTS)}


def records(run):
    return [r for r in run.rows().iter_rows(named=True) if r["kind"] in ("tensor", "grad")]


def test_threads_have_rows_of_their_own(tmp_path, model):
    ready = threading.Barrier(3)
    found = {}

    def call(n):
        ready.wait()
        with torch.no_grad():
            cache = caches_of("dynamic", model)
            for step in range(6):
                model(torch.tensor([[n + 1]]), cache=cache)
                found.setdefault(n, []).append(here.ids)
                assert step < 9

    class Here(threading.local):
        ids = None

    here = Here()

    def look(*_):
        here.ids = rows_around()[0].taken().ids.tolist()

    handle = model.model.norm.register_forward_hook(look)
    with recording(tmp_path), follow_rows(model):
        threads = [threading.Thread(target=call, args=(n,)) for n in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    handle.remove()
    for n, steps in found.items():
        assert steps == [[[one]] for one in oracle.ids([n + 1] * 6)]


def test_a_forward_that_is_called_by_hand(tmp_path, model):
    tokens, mask = padded(PROMPTS)
    for at, expected in [
        (model.model.norm, beside(PROMPTS)), (model.lm_head, [row[-2:] for row in beside(PROMPTS)])
    ]:  # fmt: skip
        fresh = copy.deepcopy(model)
        at = dict(fresh.named_modules())[next(n for n, m in model.named_modules() if m is at)]
        seen = []
        at.register_forward_hook(
            lambda *_, seen=seen: seen.append([o.taken().ids.tolist() for o in rows_around()])
        )
        with recording(tmp_path, rows="auto"):
            for _ in range(2):
                fresh.forward(input_ids=tokens, attention_mask=mask, logits_to_keep=2)
            assert rows_around() == ()
        assert seen == [[expected]] * 2


def test_a_model_that_wrappers_hold(tmp_path, model):
    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    kind = type("Wrapper", (nn.Module,), {"__module__": "torch.nn.parallel.x", "forward": forward})
    wrapper = kind()
    wrapper.module = kind()
    wrapper.module.module = model
    tokens, mask = padded(PROMPTS)
    with followed(tmp_path, wrapper, at=model.model.norm) as seen:
        wrapper(tokens, attention_mask=mask)
    assert ids(seen) == beside(PROMPTS)


def test_a_model_inside_another_that_is_given_other_tokens(tmp_path, model):
    class Halves(type(model)):
        """Calls the inner model with halves of the batch."""

        def forward(self, input_ids=None, attention_mask=None):
            for part in (slice(0, 1), slice(1, None)):
                self.model(input_ids[part], attention_mask[part])

    halves = Halves(model.config)
    tokens, mask = padded(PROMPTS)
    with followed(tmp_path, halves, at=halves.model.norm) as seen:
        halves(tokens, mask)
    every = beside(PROMPTS)
    assert [ids([one]) for one in seen] == [every[:1], every[1:]]


def test_gradients_and_repeated_taps_have_rows(tmp_path):
    model = tiny().train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    table = tmp_path / "t.toml"
    table.write_text('[taps]\n"*.q_proj" = { tap = "q", dims = "b s h", grad = true }\n')
    rows_of = [[[5, 6, 7], [8, 9]], [[1, 2, 3]]]
    with Recorder(tmp_path / "r", taps=str(table), rows="auto"):
        losses = []
        for one in rows_of:
            tokens, mask = padded(one)
            losses.append(model(tokens, mask, labels=tokens, use_cache=False).loss)
        sum(losses).backward()
    run = Recording.open(tmp_path / "r")
    found = [(r["kind"], r["occurrence"] // 2, run.ids(r)[0].ids.tolist()) for r in records(run)]
    assert {kind for kind, *_ in found} == {"tensor", "grad"}
    assert any('"recompute"' in r["tags"] for r in records(run))
    for kind, occurrence, every in found:
        assert every == beside(rows_of[occurrence]), (kind, occurrence)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize(
    "how",
    ["whole", *(pytest.param(how, marks=pytest.mark.slow) for how in ("in place", "inner"))],
)
def test_a_compiled_model(tmp_path, how):
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1)
    called = model
    if how == "whole":
        called = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.model = torch.compile(model.model, backend="eager")
    with torch.no_grad(), Recorder(tmp_path / "r", taps="hf-llama", rows="auto"):
        cache = caches_of("dynamic", model)
        for one in ([[5, 6, 7]], [[8]], [[9]]):
            called(torch.tensor(one), cache=cache)
    run = Recording.open(tmp_path / "r")
    hidden = [run.ids(r)[0].ids.tolist() for r in records(run) if r["name"] == "final_norm"]
    every = oracle.ids([5, 6, 7, 8, 9])
    assert hidden == [[every[:3]], [every[3:4]], [every[4:]]]


def test_nothing_is_left_of_it(tmp_path, model):
    import transformers.cache_utils as there

    before = dict(vars(there.DynamicLayer))
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    with followed(tmp_path, model):
        assert count() > 1
        cache = model(torch.tensor([[5, 6]])).cache
        assert "crop" in vars(there.DynamicLayer) and there.DynamicLayer.crop is not before["crop"]
    assert count() == 0 and dict(vars(there.DynamicLayer)) == before
    del cache
    gc.collect()
    assert caches._known == {}


def test_a_cache_that_is_gone_is_not_remembered(tmp_path, model):
    with torch.no_grad(), followed(tmp_path, model):
        for _ in range(3):
            cache = caches_of("dynamic", model)
            model(torch.tensor([[5, 6]]), cache=cache)
            model(torch.tensor([[7]]), cache=cache)
            del cache
        gc.collect()
        assert len(caches._known) <= 1  # that of the last forward may be held by its output


def test_a_long_generation_keeps_what_it_knows_once(tmp_path, model):
    with torch.no_grad(), followed(tmp_path, model) as seen:
        cache = caches_of("dynamic", model)
        for n in range(200):
            model(torch.tensor([[n % 60], [n % 50]]), cache=cache)
    assert ids(seen) == [
        oracle.ids([n % size for n in range(200)])[-1:] for size in (60, 50)
    ]  # fmt: skip
