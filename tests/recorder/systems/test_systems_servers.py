"""Rows of vLLM's and sglang's models, with stand-ins of what these are called with.

`Server` keeps requests in blocks of a cache that fills up: prefixes are shared and evicted, prompts
come in chunks, drafts are rejected, and requests are put back. `Vllm` and `Sglang` say of its steps
what the real ones do.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest
import token_oracle as oracle
import torch
from following import recording
from torch import nn

from recorder import follow_rows
from recorder.systems import missed
from recorder.taps.around import rows_around


class Request:
    def __init__(self, name, tokens):
        self.name, self.tokens = name, tokens  # that it will have
        self.had = 0
        self.blocks = []
        self.salt = None


class Server:
    """Requests, and blocks of places that hold what was computed there.

    Args:
        rng: decides what happens.
        count: how many blocks there are; the first is never used.
        size: how many places a block has.
    """

    def __init__(self, rng, count=24, size=4):
        self.rng, self.size = rng, size
        self.free = list(range(1, count))
        rng.shuffle(self.free)
        self.cached = {}  # a prefix of whole blocks -> the block at its end
        self.users = {}
        self.requests = []
        self.number = 0
        self.prefixes = [[rng.randrange(5) for _ in range(rng.randrange(4, 14))] for _ in range(3)]

    def arrive(self):
        rng = self.rng
        tokens = [*rng.choice(self.prefixes), *(rng.randrange(5) for _ in range(rng.randrange(12)))]
        request = Request(f"r{self.number}", tokens)
        self.number += 1
        whole = (len(tokens) - 1) // self.size
        for end in range(1, whole + 1):
            block = self.cached.get(tuple(tokens[: end * self.size]))
            if block is None:
                break
            request.blocks.append(block)
            self.users[block] = self.users.get(block, 0) + 1
        request.had = len(request.blocks) * self.size
        self.requests.append(request)

    def block(self):
        """Return a free block; what is cached and not in use is evicted for it."""
        if not self.free:
            idle = [key for key, block in self.cached.items() if not self.users.get(block)]
            if not idle:
                return None
            self.free.append(self.cached.pop(self.rng.choice(idle)))
        block = self.free.pop(self.rng.randrange(len(self.free)))
        self.users[block] = 1
        return block

    def leave(self, request):
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block] and block not in self.cached.values():
                self.free.append(block)
        request.blocks = []

    def put_back(self, request):
        self.leave(request)
        request.had = 0

    def step(self):
        """Return [(request, from which position, to which)], with places for all."""
        rng, chunks = self.rng, []
        for request in rng.sample(self.requests, rng.randrange(len(self.requests) + 1)):
            if rng.random() < 0.08:
                self.put_back(request)
            end = min(len(request.tokens), request.had + rng.choice([1, 1, 1, 3, 9]))
            while len(request.blocks) * self.size < end:
                block = self.block()
                if block is None:
                    break
                request.blocks.append(block)
            end = min(end, len(request.blocks) * self.size)
            if end > request.had:
                chunks.append((request, request.had, end))
        return chunks

    def done(self, chunks):
        """Hear that a step was computed; some of its tokens may have been drafts."""
        for request, begin, end in chunks:
            request.had = end
            for full in range(begin // self.size, end // self.size):
                self.cached.setdefault(
                    tuple(request.tokens[: (full + 1) * self.size]), request.blocks[full]
                )
            if end - begin > 1 and self.rng.random() < 0.2:
                self.reject(request, begin + 1)
            if request.had == len(request.tokens) and self.rng.random() < 0.5:
                self.requests.remove(request)
                self.leave(request)

    def reject(self, request, keep):
        """Take tokens of its last block back, which then become others."""
        first = max(keep, (request.had // self.size) * self.size)
        if first < request.had:
            rest = [self.rng.randrange(5) for _ in range(len(request.tokens) - first)]
            request.tokens = [*request.tokens[:first], *rest]
            request.had = first

    def place(self, request, position):
        return request.blocks[position // self.size] * self.size + position % self.size


class Layers(nn.Module):
    def forward(self, input_ids, positions, forward_batch=None):
        return input_ids


class Model(nn.Module):
    """A model and what makes logits, called as each server does."""

    def __init__(self):
        super().__init__()
        self.model = Layers()
        self.logits_processor = nn.Identity()


class VllmModel(Model):
    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return self.model(input_ids, positions)

    def compute_logits(self, hidden):
        return self.logits_processor(hidden)


class SglangModel(Model):
    def forward(self, input_ids, positions, forward_batch):
        hidden = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(hidden)


for kind, file in ((VllmModel, "vllm.models.x"), (SglangModel, "sglang.srt.models.x")):
    kind.__module__ = file
    # Inside, each is a class of the server's too.
Inner = {
    "vllm": type("VllmLayers", (Layers,), {"__module__": "vllm.models.x"}),
    "sglang": type("SglangLayers", (Layers,), {"__module__": "sglang.srt.models.x"}),
}


class Mode:
    def __init__(self, name):
        self.name = name

    def is_idle(self):
        return self.name == "idle"

    def is_decode(self):
        return self.name == "decode"


class Serving:
    """Runs steps and keeps what rows held: of all tokens, and of those that logits are of."""

    def __init__(self, model, monkeypatch):
        self.model, self.patch = model, monkeypatch
        self.model.model = Inner[type(model).__module__.partition(".")[0]]()
        self.seen, self.last = [], []
        model.model.register_forward_hook(lambda *_: self.seen.append(self._held()))
        model.logits_processor.register_forward_hook(lambda *_: self.last.append(self._held()))

    @staticmethod
    def _held():
        return {" ".join(one.names): one.taken().ids.tolist() for one in rows_around()}


class Vllm(Serving):
    def __init__(self, monkeypatch):
        super().__init__(VllmModel(), monkeypatch)
        self.context = None

        def get_forward_context():
            assert self.context is not None, "Forward context is not set."
            return self.context

        there = SimpleNamespace(get_forward_context=get_forward_context)
        monkeypatch.setitem(sys.modules, "vllm.forward_context", there)

    def run(self, server, chunks, pads=0, embeds=None, **more):
        widest = max(len(request.blocks) for request, *_ in chunks) + 1
        table = torch.zeros(len(chunks) + pads, widest, dtype=torch.int32)
        for i, (request, *_) in enumerate(chunks):
            table[i, : len(request.blocks)] = torch.tensor(request.blocks)
        counts = [end - begin for _, begin, end in chunks]
        starts = torch.tensor([0, *counts, *[0] * pads]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([*(end for *_, end in chunks), *[0] * pads], dtype=torch.int32)
        at = [(request, i) for request, begin, end in chunks for i in range(begin, end)]
        places = [server.place(request, i) for request, i in at] + [-1] * pads
        layer = SimpleNamespace(
            num_actual_tokens=len(at), query_start_loc=starts, seq_lens=lengths,
            block_table=table, slot_mapping=torch.tensor(places), **more,
        )  # fmt: skip
        mamba = SimpleNamespace(query_start_loc=starts)
        self.context = SimpleNamespace(attn_metadata={"mamba.0": mamba, "layers.1.attn": layer})
        tokens = torch.tensor([request.tokens[i] for request, i in at] + [0] * pads)
        positions = torch.tensor([i for _, i in at] + [0] * pads)
        try:
            with torch.inference_mode():
                hidden = self.model(None if embeds else tokens, positions, inputs_embeds=embeds)
                if hidden is not None:
                    self.model.compute_logits(hidden[starts[1:].long()[: len(chunks)] - 1])
                    self.model.compute_logits(hidden[: len(chunks)])  # of prompts, perhaps
        finally:
            self.context = None


class Sglang(Serving):
    by_hand = has_pool = True

    def __init__(self, monkeypatch):
        super().__init__(SglangModel(), monkeypatch)
        self.pool = torch.zeros(32, 64, dtype=torch.int32)
        self.at = {}

    def run(self, server, chunks, pads=0, **more):
        for request, _, end in chunks:
            if request not in self.at:
                self.at[request] = next(i for i in range(1, 32) if i not in self.at.values())
            row = self.pool[self.at[request]]
            for i in range(end):
                row[i] = server.place(request, i)
        for gone in [one for one in self.at if one not in server.requests]:
            del self.at[gone]
        counts = [end - begin for _, begin, end in chunks]
        at = [(request, i) for request, begin, end in chunks for i in range(begin, end)]
        tokens = torch.tensor([request.tokens[i] for request, i in at] + [0] * pads)
        positions = torch.tensor([i for _, i in at] + [0] * pads)
        places = torch.tensor([server.place(request, i) for request, i in at] + [0] * pads)
        ends = [end for *_, end in chunks]
        begins = [begin for _, begin, _ in chunks]
        requests = [self.at[request] for request, *_ in chunks]
        about = {"extend_seq_lens": torch.tensor(counts), "extend_prefix_lens": begins}
        mode = Mode("extend")
        if set(counts) == {1}:
            mode, about = Mode("decode"), {"extend_seq_lens": None}
            requests, ends = requests + [0] * pads, ends + [1] * pads
        pool = SimpleNamespace(req_to_token=self.pool)
        batch = SimpleNamespace(
            forward_mode=mode, batch_size=len(requests), input_ids=tokens, positions=positions,
            req_pool_indices=torch.tensor(requests), seq_lens=torch.tensor(ends),
            out_cache_loc=places, rids=[request.name for request, *_ in chunks],
            req_to_token_pool=pool if self.has_pool else None,
            lora_ids=[request.salt for request, *_ in chunks], **about, **more,
        )  # fmt: skip
        with torch.inference_mode():
            call = self.model.forward if self.by_hand else self.model
            call(tokens, positions, batch)


SYSTEMS = {"vllm": Vllm, "sglang": Sglang}


@pytest.fixture(params=SYSTEMS)
def serving(request, monkeypatch, tmp_path):
    one = SYSTEMS[request.param](monkeypatch)
    with recording(tmp_path), follow_rows(one.model):
        yield one


def due(chunks, pads=0):
    found = [
        one for request, begin, end in chunks
        for one in oracle.ids(request.tokens[:end], request.salt)[begin:]
    ]  # fmt: skip
    return found + [-1] * pads


def test_requests_that_share_prefixes_and_come_and_go(serving):
    rng = random.Random(3)
    server = Server(rng)
    steps = cached = 0
    for _ in range(300):
        if rng.random() < 0.4 and len(server.requests) < 8:
            server.arrive()
            cached += server.requests[-1].had > 0
        chunks = server.step()
        if not chunks:
            continue
        pads = rng.choice([0, 0, 1, 3])
        serving.run(server, chunks, pads)
        assert serving.seen[-1]["t"] == due(chunks, pads)
        ends = [oracle.ids(request.tokens[:end])[-1] for request, _, end in chunks]
        is_decode = {end - begin for _, begin, end in chunks} == {1}
        fill = [-1] * pads if isinstance(serving, Sglang) and is_decode else []
        assert serving.seen[-1]["n"] == ends + fill
        server.done(chunks)
        steps += 1
    assert steps > 150 and cached > 30 and server.number > 60


def one_request(server, tokens):
    request = Request("r", tokens)
    request.blocks = [server.block() for _ in range(len(tokens) // server.size + 1)]
    server.requests.append(request)
    return request


def test_logits_have_the_rows_of_the_last_tokens(serving):
    server = Server(random.Random(0))
    chunks = [(one_request(server, one), 0, 2) for one in ([1, 2, 3], [4, 3, 2])]
    serving.run(server, chunks)
    ends = [oracle.ids(request.tokens[:end])[-1] for request, _, end in chunks]
    assert serving.last[0].get("n") == ends
    assert all("n" not in one for one in serving.last[1:])  # another call of it is of others
    assert rows_around() == ()


NEVER = "since what their cache begins with was not seen here"


def test_a_prefix_that_was_never_seen_gives_no_ids_and_is_said_once(serving, capsys):
    server = Server(random.Random(0))
    old, new = one_request(server, [1, 2, 3, 4, 1]), one_request(server, [2, 2, 2])
    serving.run(server, [(old, 2, 4), (new, 0, 2)])
    serving.run(server, [(old, 4, 5), (new, 2, 3)])
    assert serving.seen[0]["t"] == [-1, -1, *oracle.ids([2, 2])]
    assert serving.seen[1]["t"] == [-1, oracle.ids([2, 2, 2])[-1]]
    assert serving.seen[1]["n"] == serving.seen[1]["t"]
    assert capsys.readouterr().err.count(NEVER) == 1


def test_a_step_that_nobody_saw_makes_what_is_known_void(serving):
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3, 4, 1])
    serving.run(server, [(request, 0, 2)])
    missed.note()  # a graph was replayed, or the model ran while nothing recorded
    serving.run(server, [(request, 2, 3)])
    assert serving.seen[-1]["t"] == [-1]
    serving.run(server, [(request, 0, 3)])
    serving.run(server, [(request, 3, 4)])
    assert serving.seen[-1]["t"] == [oracle.ids([1, 2, 3, 4])[-1]]


def test_positions_that_do_not_go_on_give_no_ids(serving, monkeypatch):
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3, 4, 1])
    serving.model.register_forward_pre_hook(lambda module, args: (args[0], args[1] + 1, *args[2:]))
    serving.by_hand = False
    serving.run(server, [(request, 0, 2)])
    assert serving.seen[-1]["t"] == [-1, -1]


def test_vllm_without_requests_or_tokens_or_with_what_its_metadata_does_not_say(
    monkeypatch, tmp_path, capsys
):
    one = Vllm(monkeypatch)
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3, 4, 1])
    with recording(tmp_path), follow_rows(one.model):
        one.model(torch.tensor([1]), torch.tensor([0]))  # as it warms up
        assert one.seen == [{}] and capsys.readouterr().err == ""
        for more, said in [
            ({"causal": False}, "its tokens see those that come later"),
            ({"dcp_context_kv_lens": torch.ones(1)}, "its cache is cut over ranks"),
        ]:
            one.run(server, [(request, 0, 2)], **more)
            assert one.seen[-1] == {} and said in capsys.readouterr().err
        one.run(server, [(request, 0, 2)], embeds=[1.0])
        assert "it is given embeddings and no tokens" in capsys.readouterr().err
        transfer = SimpleNamespace(has_kv_transfer_group=lambda: True)
        monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer", transfer)
        one.run(server, [(request, 0, 2)])
        assert "its cache is filled by others too" in capsys.readouterr().err
    assert all(seen == {} for seen in one.seen)


def test_vllm_with_adapters_or_another_attention_is_said(monkeypatch, tmp_path, capsys):
    one = Vllm(monkeypatch)
    one.model.lora = type("LinearWithLoRA", (nn.Module,), {})()
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3])
    with recording(tmp_path), follow_rows(one.model):
        one.run(server, [(request, 0, 2)])
        assert one.seen[-1] == {} and "it has LoRA adapters" in capsys.readouterr().err
    other = Vllm(monkeypatch)
    kind = type("FlashInferMetadata", (), {})
    with recording(tmp_path), follow_rows(other.model):
        other.context = SimpleNamespace(attn_metadata={"a": kind()})
        other.model(torch.tensor([1]), torch.tensor([0]))
    said = capsys.readouterr().err
    assert "its attention's metadata is FlashInferMetadata" in said and "FLASH_ATTN" in said


def test_adapters_of_sglang_s_requests_are_part_of_their_rows(monkeypatch, tmp_path):
    one = Sglang(monkeypatch)
    server = Server(random.Random(0))
    requests = [one_request(server, [1, 2, 3]) for _ in range(3)]
    requests[1].salt, requests[2].salt = "a", "b"
    with recording(tmp_path), follow_rows(one.model):
        chunks = [(request, 0, 2) for request in requests]
        one.run(server, chunks)
        assert one.seen[-1]["t"] == due(chunks)
        chunks = [(request, 2, 3) for request in requests]
        one.run(server, chunks)
        assert one.seen[-1]["t"] == due(chunks) and len({*one.seen[-1]["t"]}) == 3


def test_images_of_sglang_s_requests_give_those_no_ids(monkeypatch, tmp_path):
    one = Sglang(monkeypatch)
    server = Server(random.Random(0))
    a, b = one_request(server, [1, 2, 3]), one_request(server, [1, 2, 3])
    with recording(tmp_path), follow_rows(one.model):
        one.run(server, [(a, 0, 2), (b, 0, 2)], mm_inputs=[None, object()])
        one.run(server, [(a, 2, 3), (b, 2, 3)], mm_inputs=[None, object()])
    assert one.seen[0]["t"] == [*oracle.ids([1, 2]), -1, -1]
    assert one.seen[1]["t"] == [oracle.ids([1, 2, 3])[-1], -1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"enable_hierarchical_cache": True}, "serve without --enable-hierarchical-cache"),
        ({"disaggregation_mode": "decode"}, "serve without --disaggregation-mode"),
        ({"enable_hierarchical_cache": False, "disaggregation_mode": "null"}, ""),
    ],
)
def test_a_cache_of_sglang_that_others_fill(monkeypatch, tmp_path, capsys, args, said):
    one = Sglang(monkeypatch)
    there = SimpleNamespace(get_global_server_args=lambda: SimpleNamespace(**args))
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", there)
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3])
    with recording(tmp_path), follow_rows(one.model):
        one.run(server, [(request, 0, 2)])
    assert bool(said) is (one.seen[-1] == {}) and said in capsys.readouterr().err


def test_sglang_without_requests_is_quiet(monkeypatch, tmp_path, capsys):
    one = Sglang(monkeypatch)
    with recording(tmp_path), follow_rows(one.model):
        batch = SimpleNamespace(forward_mode=Mode("idle"))
        one.model(torch.tensor([1]), torch.tensor([0]), batch)
    assert one.seen == [{}] and capsys.readouterr().err == ""


def test_a_pool_of_sglang_that_is_in_its_context(monkeypatch, tmp_path):
    one = Sglang(monkeypatch)
    backend = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=one.pool))
    there = SimpleNamespace(get_forward_context=lambda: SimpleNamespace(attn_backend=backend))
    monkeypatch.setitem(sys.modules, "sglang.srt.model_executor.forward_context", there)
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3])
    one.has_pool = False
    with recording(tmp_path), follow_rows(one.model):
        one.run(server, [(request, 0, 2)])
    assert one.seen[-1]["t"] == oracle.ids([1, 2])


def test_a_batch_of_sglang_that_lacks_something_is_said(monkeypatch, tmp_path, capsys):
    one = Sglang(monkeypatch)
    server = Server(random.Random(0))
    request = one_request(server, [1, 2, 3])
    one.has_pool = False
    with recording(tmp_path), follow_rows(one.model):
        one.run(server, [(request, 0, 2)])
    said = capsys.readouterr().err
    assert one.seen == [{}] and "its SimpleNamespace has no req_to_token_pool; say which" in said
