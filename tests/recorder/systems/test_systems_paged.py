"""Rows of transformers' continuous batching: of requests that come, share, move and come back."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest
import token_oracle as oracle
import torch
from following import has_transformers, recording, tiny
from torch import nn

from recorder import follow_rows
from recorder.systems import missed, paged
from recorder.taps.around import rows_around


def version():
    return tuple(map(int, metadata.version("transformers").split(".")[:2]))


pytestmark = pytest.mark.skipif(
    not has_transformers or version() < (5, 20), reason="needs transformers 5.20"
)

PROMPTS = [[5, 6, 7], [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14], [8]]
SHARED = [7, 8, 9, 10, 11, 12, 13, 14]


@pytest.fixture(scope="module")
def model():
    return tiny()


class Batching:
    """Runs requests, and keeps of each forward its tokens, positions and ids."""

    def __init__(self, model, tmp_path):
        self.model, self.tmp_path = model, tmp_path
        self.steps, self.heads, self.starts = [], [], []

    def __call__(self, prompts, config=None, rows="auto", **generation):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        sizes = {"page_size": 4, "num_blocks": 24, "max_batch_tokens": 12, **(config or {})}
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.model.norm.register_forward_hook(self._at_norm),
            self.model.lm_head.register_forward_hook(self._at_head),
        ]
        try:
            with recording(self.tmp_path, rows=rows):
                done = self.model.generate_batch(
                    inputs=prompts,
                    generation_config=GenerationConfig(**{**how, **generation}),
                    continuous_batching_config=ContinuousBatchingConfig(**sizes),
                    progress_bar=False,
                )
        finally:
            for one in handles:
                one.remove()
        return [one.prompt_ids + one.generated_tokens for one in done.values()]

    def _before(self, module, args, kwargs):
        tokens, places = kwargs["input_ids"][0].tolist(), kwargs["position_ids"][0].tolist()
        bounds = kwargs["cu_seq_lens_q"]
        firsts = [places[i] for i in bounds[:-1].tolist()]
        self.steps.append([list(zip(tokens, places, strict=True))])
        self.starts += firsts
        self.kept = kwargs["logits_indices"].tolist()

    def _at_norm(self, *_):
        self.steps[-1].append([one.taken().ids.tolist() for one in rows_around()])

    def _at_head(self, *_):
        [[ids]] = [one.taken().ids.tolist() for one in rows_around()] or [[[]]]
        self.heads.append((ids, [self.steps[-1][1][0][0][i] for i in self.kept] if ids else []))

    def agreeing(self, whole):
        """Hold all ids against the oracle's of whole sequences; return how many there are."""
        due = {
            one: (row[i], i) for row in whole for i, one in enumerate(oracle.ids(row))
        }  # fmt: skip
        count = absent = 0
        for tokens, held in self.steps:
            [[ids]] = held or [[[-1] * len(tokens)]]
            assert len(ids) == len(tokens)
            for token, one in zip(tokens, ids, strict=True):
                count, absent = count + 1, absent + (one == -1)
                assert one == -1 or due[one] == token
        for ids, expected in self.heads:
            assert ids == expected
        return count, absent


@pytest.fixture
def batching(model, tmp_path):
    return Batching(model, tmp_path)


def test_requests_in_chunks_and_steps(batching):
    whole = batching(PROMPTS)
    assert batching.agreeing(whole) == (30, 0)
    assert any(start not in (0, 3, 11, 1) for start in batching.starts)  # a prompt in two chunks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_prefix_that_requests_share(batching, mode):
    """The second prompt finds the blocks of the first in the cache, and begins behind them."""
    prompts = [[*SHARED, 1], [*SHARED, 2, 3], [*SHARED, 4]]
    with mode():
        whole = batching(prompts, {"max_requests_per_batch": 1}, max_new_tokens=3)
    assert batching.agreeing(whole)[1] == 0
    assert batching.starts.count(0) == 1 and batching.starts.count(len(SHARED)) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_request_that_is_forked(batching, mode):
    """Its children get copies of the block that is not full, which no forward has written."""
    with mode():
        whole = batching(
            [[5, 6, 7], [8, 9, 1, 2, 3]], do_sample=True, num_return_sequences=3, seed=1
        )
    assert len(whole) == 6
    count, absent = batching.agreeing(whole)
    assert absent == 0 and count > 6 * 4


def test_a_request_whose_blocks_others_take_and_that_comes_back(batching):
    """There is room for few blocks: requests are put back and computed anew in other places."""
    prompts = [[i, *range(10, 17)] for i in range(1, 6)]
    whole = batching(prompts, {"num_blocks": 9, "allow_block_sharing": False}, max_new_tokens=12)
    count, absent = batching.agreeing(whole)
    assert absent == 0
    assert count > sum(map(len, whole)) - len(whole)  # some tokens were computed twice


def test_a_cache_that_somebody_writes_to_gives_no_ids_to_what_goes_on(batching, model, capsys):
    handles = []

    def spoil(module, args, kwargs, output):
        if len(batching.steps) == 2:
            kwargs["cache"].cache_tensor.zero_()

    def begin(*_):  # once what follows rows has its hooks there
        if not handles:
            handles.append(model.register_forward_hook(spoil, with_kwargs=True))

    first = model.register_forward_pre_hook(begin)
    whole = batching(PROMPTS)
    for one in [first, *handles]:
        one.remove()
    steps = [ids for _, ids in batching.steps]
    assert all(-1 not in one[0][0] for one in steps[:2])
    assert all({*one[0][0]} == {-1} for one in steps[2:])
    assert whole and capsys.readouterr().err.count("some requests have no ids") == 1


def test_nothing_is_left_of_it(batching, model):
    from transformers.generation.continuous_batching import cache_allocators

    kind = cache_allocators.FullAttentionCacheAllocator
    before = kind.copy_blocks
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(kind.copy_blocks))
    batching(PROMPTS[:1], max_new_tokens=2)
    handle.remove()
    assert seen[0] is not before and kind.copy_blocks is before
    assert paged._known == {} and not hasattr(torch.cuda.CUDAGraph.replay, "__wrapped__")


# What needs a GPU or other memory, with stand-ins of the same form.


class Group:
    """As a part of a cache is: blocks of places, some in use by requests."""

    layer_type, index, tokens_per_page, write_trash_index = "full_attention", 0, 4, 999
    block_physical_stride = 8  # as where two layers share it

    def __init__(self):
        self.block_table = {}

    def copy_blocks(self, sources, places):
        pass


class Cache:
    def __init__(self):
        self.cache_allocators = {"full_attention": Group()}
        self.cache_tensor = torch.zeros(4)


class Served(nn.Module):
    """Says it is transformers' own, and is called as that is."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(is_causal=True, is_decoder=True)
        self.inner = nn.Identity()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **rest):
        cache.cache_tensor.add_(1)
        return self.inner(input_ids)


class Decoding:
    """Steps of one token a request, whose places a table of blocks gives."""

    def __init__(self, tmp_path, tables):
        self.cache, self.model, self.tables = Cache(), Served(), tables
        self.seen = []
        self.model.inner.register_forward_hook(
            lambda *_: self.seen.append([one.taken().ids[0].tolist() for one in rows_around()])
        )

    def step(self, tokens, places, pads=0):
        many = len(tokens)
        blocks = torch.tensor([self.tables[: many + pads]])
        bounds = [*range(many + 1), *[many] * pads]
        with torch.no_grad():
            self.model(
                input_ids=torch.tensor([tokens + [0] * pads]),
                position_ids=torch.tensor([places + [0] * pads]),
                cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32),
                block_table=blocks.to(torch.int32) * 2,  # in pages, of which a block has two
                read_index=[], write_index=[], cu_seq_lens_k={}, cache=self.cache,
            )  # fmt: skip
        return self.seen[-1][0] if self.seen[-1] else None


@pytest.fixture
def decoding(tmp_path):
    one = Decoding(tmp_path, [[3, 1], [0, 2], [4, 5]])
    with recording(tmp_path), follow_rows(one.model, "transformers"):
        yield one


def test_places_that_a_table_of_blocks_gives(decoding):
    rows = [[5, 6, 7, 8, 9, 1], [4, 3, 2, 1, 2, 3]]
    for i in range(6):
        found = decoding.step([row[i] for row in rows], [i, i], pads=1)
        assert found == [*(oracle.ids(row)[i] for row in rows), -1]


def test_a_graph_that_is_replayed_makes_what_is_known_void(decoding):
    decoding.step([5, 4], [0, 0])
    missed.note()
    assert decoding.step([6, 3], [1, 1]) == [-1, -1]
    assert decoding.step([7, 2], [2, 0]) == [-1, oracle.ids([2])[0]]


def test_what_is_captured_is_not_read(decoding, monkeypatch):
    """To copy anything to the host would spoil the graph that the job captures."""
    decoding.step([5, 4], [0, 0])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(torch.Tensor, "to", None)
        patch.setattr(torch.Tensor, "tolist", None)
        with torch.no_grad():
            decoding.model(input_ids=torch.tensor([[1]]), cache=decoding.cache)
        assert rows_around() == () and decoding.seen[-1] == []
    assert decoding.step([6, 3], [1, 1]) == [-1, -1]


def test_graphs_outside_of_calls_are_noted(decoding, monkeypatch):
    decoding.step([5, 4], [0, 0])
    replay = torch.cuda.CUDAGraph.replay
    assert hasattr(replay, "__wrapped__")
    before = missed.count()
    with pytest.raises(Exception):  # noqa: B017  # there is no graph
        replay(object())
    assert missed.count() == before + 1


def test_blocks_that_come_back_from_another_memory_are_forgotten(tmp_path, monkeypatch):
    class OffloadingManager:
        def __init__(self, cache):
            self.cache = cache

        def restore_scheduled_requests(self, requests_in_batch):
            self.cache.cache_tensor.add_(1)
            for one in requests_in_batch:
                one.state.is_cpu_offloaded = False

    import sys

    there = SimpleNamespace(OffloadingManager=OffloadingManager)
    monkeypatch.setitem(sys.modules, paged._OFFLOADING, there)
    one = Decoding(tmp_path, [[3, 1], [0, 2]])
    with recording(tmp_path), follow_rows(one.model, "transformers"):
        one.step([5, 4], [0, 0])
        one.step([6, 3], [1, 1])
        group = one.cache.cache_allocators["full_attention"]
        group.block_table["a"] = [3, 1]
        state = SimpleNamespace(request_id="a", is_cpu_offloaded=True)
        OffloadingManager(one.cache).restore_scheduled_requests([SimpleNamespace(state=state)])
        assert one.step([7, 2], [2, 2]) == [-1, oracle.ids([4, 3, 2])[-1]]
    assert "restore" in OffloadingManager.restore_scheduled_requests.__name__
    assert not hasattr(OffloadingManager.restore_scheduled_requests, "__wrapped__")


def test_a_fork_of_stand_ins(decoding):
    decoding.step([5, 4], [0, 0])
    decoding.step([6, 3], [1, 1])
    decoding.cache.cache_allocators["full_attention"].copy_blocks([0], [4])
    decoding.tables[1] = [4, 5]
    assert decoding.step([7, 2], [2, 2]) == [oracle.ids([5, 6, 7])[-1], oracle.ids([4, 3, 2])[-1]]


def test_a_batching_of_another_form_is_said(decoding, capsys):
    decoding.step([5], [0])
    decoding.cache.cache_allocators["full_attention"].tokens_per_page = None
    decoding.step([6], [1])
    decoding.cache.cache_allocators["full_attention"].tokens_per_page = 4
    assert decoding.seen[1] == [] and decoding.step([7], [2]) == [-1]
    assert "its continuous batching is of a kind that is not known" in capsys.readouterr().err
