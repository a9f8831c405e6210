"""The tables that come with us, held against the models that they are for.

Hugging Face's are the real ones, Megatron-Core's too but for its TransformerEngine spec; for it,
vLLM and sglang there are stand-ins with their names, calls and habits, in `tests/helping`.
"""

from __future__ import annotations

import copy
import gc
import math
import re
from collections import defaultdict
from importlib import metadata, util
from pathlib import Path

import pytest
import te_spec
import torch
from serving import served
from torch import nn

from recorder import Recorder, Recording, declare_mesh
from recorder.modules import table
from replayer import Replayer, diff

LAYERS = 2
SMALL = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 50,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOKENS = torch.arange(10).reshape(2, 5) + 3


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()
    gc.collect()  # a model of an earlier test would be looked at again


def hugging(kind: str, **changed):
    """Return a tiny model of transformers, the same each time."""
    if util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    if int(metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip(f"transformers {metadata.version('transformers')} is before 5")
    import transformers

    config, sizes = MODELS[kind][:2]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**sizes, **changed})
    model = getattr(transformers, kind)(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no norm whose weights are all one, no bias of zeros
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


ENDS = {"tokens", "embed", "final_norm", "logits"}
NORMS = {"attn_norm", "resid_mid", "mlp_norm"}
ATTENTION = {"q", "k", "v", "q_rope", "k_rope", "attn_ctx", "attn_out"}
DENSE = {"gate", "up", "mlp_act", "mlp_out", "hidden"}
LLAMA = ENDS | NORMS | ATTENTION | DENSE
QK_NORMS = {"q_norm", "k_norm"}
SPARSE = ENDS | NORMS | ATTENTION | {"router", "mlp_out", "hidden"}
BERT = {
    "tokens", "embed", "q", "k", "v", "attn_ctx", "attn_out", "resid_mid", "mlp_norm", "up",
    "mlp_act", "mlp_out", "hidden",
}  # fmt: skip
MODELS = {
    # class -> config, sizes, table, taps
    "LlamaForCausalLM": ("LlamaConfig", DECODER, "hf-llama", LLAMA),
    "LlamaModel": ("LlamaConfig", DECODER, "hf-llama", LLAMA - {"logits"}),
    "LlamaForSequenceClassification": (
        "LlamaConfig", {**DECODER, "pad_token_id": 0}, "hf-llama", LLAMA - {"logits"} | {"score"},
    ),
    "MistralForCausalLM": ("MistralConfig", {**DECODER, "head_dim": 16}, "hf-llama", LLAMA),
    "Qwen2ForCausalLM": ("Qwen2Config", DECODER, "hf-qwen", LLAMA),
    "Qwen3ForCausalLM": ("Qwen3Config", {**DECODER, "head_dim": 16}, "hf-qwen", LLAMA | QK_NORMS),
    "MixtralForCausalLM": (
        "MixtralConfig", {**DECODER, "num_local_experts": 4}, "hf-mixtral", SPARSE,
    ),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig", {**DECODER, **MOE, "shared_expert_intermediate_size": 40}, "hf-mixtral",
        SPARSE,
    ),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig", {**DECODER, **MOE, "head_dim": 8}, "hf-mixtral", SPARSE | QK_NORMS,
    ),
    "BertModel": ("BertConfig", SMALL, "hf-bert:bert", BERT | {"pooled"}),
    "BertForMaskedLM": ("BertConfig", SMALL, "hf-bert:bert", BERT | {"logits"}),
    "BertForPreTraining": (
        "BertConfig", SMALL, "hf-bert:bert", BERT | {"pooled", "logits", "next_sentence"},
    ),
    "BertForSequenceClassification": (
        "BertConfig", SMALL, "hf-bert:bert", BERT | {"pooled", "logits"},
    ),
    "BertForQuestionAnswering": ("BertConfig", SMALL, "hf-bert:bert", BERT | {"logits"}),
    "RobertaModel": ("RobertaConfig", SMALL, "hf-bert:roberta", BERT | {"pooled"}),
    "RobertaForMaskedLM": ("RobertaConfig", SMALL, "hf-bert:roberta", BERT | {"logits"}),
    "XLMRobertaForTokenClassification": (
        "XLMRobertaConfig", SMALL, "hf-bert:roberta", BERT | {"logits"},
    ),
}  # fmt: skip
ONCE = {
    "tokens",
    "embed",
    "final_norm",
    "logits",
    "score",
    "pooled",
    "next_sentence",
    "next_logits",
}


def rows_of(section: str) -> int:
    """Return how many rows a section of a table has."""
    file, _, system = section.partition(":")
    (one,) = (s for s in table.load(file)[0].sections if s.system == system)
    return len(one.rows)


def recorded(path, model, *inputs, taps="auto", **options) -> Recording:
    with Recorder(path, taps=taps), torch.no_grad():
        model(*inputs, **options)
    return Recording.open(path)


def check(run: Recording, taps: set[str], layers: int = LAYERS) -> None:
    """Hold a recording against what it should have: each tap once a layer, in sizes that agree."""
    rows = list(run.manifest().iter_rows(named=True))
    found = defaultdict(list)
    sizes: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if row["rank"] == 0:
            assert row["occurrence"] == 0, row["name"]
            found[row["name"]].append(row["tags"])
        for name, size in sizes_of(row).items():
            sizes[name].add(size)
    assert set(found) == taps
    for name, tags in found.items():
        expected = ["{}"] if name in ONCE else [f'{{"layer":{i}}}' for i in range(layers)]
        assert sorted(tags) == expected, name
    assert {n: s for n, s in sizes.items() if len(s) > 1} == {}


def sizes_of(row) -> dict[str, int]:
    """Return the size of each name in a record's dims, as its shape and facts give them."""
    if row["dims"] is None:
        return {}
    layout, shape = re.sub(r"\[[^\]]*\]", "", row["dims"].partition("#")[0]), row["shape"]
    facts = {n: int(s) for n, s in re.findall(r"(\w+)=(\d+)", row["dims"].partition("#")[2])}
    words = layout.split()
    assert len(words) == len(shape), row
    found = {}
    if "[" in row["dims"]:
        return facts  # a block: how it is cut is checked where the blocks are put together
    for word, size in zip(words, shape, strict=True):
        names = re.findall(r"\w+", word)
        known = math.prod(facts[name] for name in names if name in facts)
        unknown = [name for name in names if name not in facts]
        assert size % known == 0, row
        if len(unknown) == 1:
            found[unknown[0]] = size // known
        else:
            assert unknown or known == size, row
    return facts | found


@pytest.mark.parametrize("kind", MODELS)
def test_auto_takes_the_table_and_every_row_fires(kind, run, capsys):
    _, _, section, taps = MODELS[kind]
    made = recorded(run, hugging(kind), TOKENS)
    check(made, taps)
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"\[graft\] taps of {kind}: {section}, \d+ of {rows_of(section)} rows fit\n", said
    ), said
    for row in made.manifest().iter_rows(named=True):
        if row["dims"] is not None:
            tags = {} if row["name"] in ONCE else {"layer": int(row["tags"][-2])}
            made.load_logical(row["name"], **tags)


def test_what_rows_without_dims_tap_hangs_on_the_class(run):
    """A classifier gives a row for each sequence, or for each token."""
    made = recorded(run, hugging("XLMRobertaForTokenClassification"), TOKENS)
    dims = {row["name"] for row in made.manifest().iter_rows(named=True) if row["dims"] is None}
    assert dims == {"logits"}


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.policy = model

    def forward(self, tokens):
        return self.policy(tokens)


def own_class(kind):
    """A subclass of a model, as users write them."""

    def wrap(model):
        model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
        return model

    return kind, wrap


VARIANTS = {
    "held": ("LlamaForCausalLM", Holder),
    "inner-held": ("Qwen3MoeForCausalLM", lambda model: Holder(model.model)),
    "bert-held": ("BertForMaskedLM", Holder),
    "bfloat16": ("Qwen3ForCausalLM", lambda model: model.to(torch.bfloat16)),
    "copied": ("MixtralForCausalLM", copy.deepcopy),
    "own-llama": own_class("LlamaForCausalLM"),
    "own-qwen": own_class("Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("how", VARIANTS)
def test_auto_finds_a_model_however_it_is_held(how, run, capsys):
    kind, change = VARIANTS[how]
    taps = MODELS[kind][3]
    made = recorded(run, change(hugging(kind)), TOKENS)
    check(made, taps - {"logits"} if how == "inner-held" else taps)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_inference_mode_and_names_for_arguments(run, capsys):
    model = hugging("Qwen3ForCausalLM")
    with Recorder(run, taps="auto"), torch.inference_mode():
        model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False)
    check(Recording.open(run), MODELS["Qwen3ForCausalLM"][3])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_is_said_of_models_that_are_not_called(run, capsys):
    others = [hugging("LlamaForCausalLM"), hugging("Qwen3MoeForCausalLM")]
    recorded(run, hugging("BertModel"), TOKENS)
    assert capsys.readouterr().err.count("\n") == 1 and len(others) == 2


def test_each_row_of_a_table_of_layers_is_grafted_back(run):
    for kind in ("Qwen3MoeForCausalLM", "BertForMaskedLM"):
        model = hugging(kind)
        made = recorded(run / kind, model, TOKENS)
        with Replayer(run / kind, taps="auto") as session, torch.no_grad():
            model(TOKENS)
        log = session.log()
        assert set(log["outcome"]) == {"grafted"} and len(log) == len(made.manifest())


class OldBlock(nn.Module):
    """What Mixtral's experts were called, and gave, in transformers before 5."""

    def __init__(self, h):
        super().__init__()
        self.gate = nn.Linear(h, 4, bias=False)

    def forward(self, x):
        return x * 2, self.gate(x.flatten(0, 1))


class OldLayer(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(h), nn.LayerNorm(h)
        self.block_sparse_moe = OldBlock(h)

    def forward(self, x):
        y, logits = self.block_sparse_moe(self.post_attention_layernorm(self.input_layernorm(x)))
        return x + y, logits


class OldMixtral(nn.Module):
    def __init__(self, h=8):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([OldLayer(h), OldLayer(h)])

    def forward(self, x):
        for layer in self.model.layers:
            x, _ = layer(x)
        return x


def test_names_and_outputs_of_older_transformers(run):
    kind = type("MixtralForCausalLM", (OldMixtral,), {"__module__": "transformers.old"})
    check(recorded(run, kind(), torch.randn(2, 3, 8)), NORMS | {"router", "mlp_out", "hidden"})


SERVED = {
    # class -> {system: table}, and which taps are not there that transformers has
    "LlamaForCausalLM": ({"vllm": "vllm-llama", "sglang": "sglang-llama"}, set()),
    "Qwen2ForCausalLM": ({"vllm": "vllm-llama", "sglang": "sglang-llama"}, set()),
    "Qwen3ForCausalLM": ({"vllm": "vllm-llama", "sglang": "sglang-llama"}, QK_NORMS),
    "Qwen3MoeForCausalLM": ({"vllm": "vllm-moe", "sglang": "sglang-moe"}, QK_NORMS),
}
ROW, ROWS = [TOKENS[0]], list(TOKENS)


def on_ranks(session, path, model, system, rows, size, change=None, **options):
    """Run each rank of a server's model under a session; return the sessions."""
    done = []
    for rank in range(size):
        one = served(model, system, rows, rank, size)
        if change is not None:
            change(one)
        declare_mesh(tp=(rank, size))
        with session(path, taps="auto", rank=rank, world_size=size, **options) as made:
            one.serve(rows)
        done.append(made)
    declare_mesh()
    return done


def agreeing(a, b) -> set[str]:
    """Return which taps two recordings have both, all of which agree."""
    found = diff(a, b, ignore_missing=True)
    assert found.status == 0
    rows = found.pairs.iter_rows(named=True)
    return {row["name"] for row in rows if row["shape_a"] and row["shape_b"]}


def served_taps(kind, system):
    without = SERVED[kind][1] if system == "sglang" else set()
    return MODELS[kind][3] - without - {"logits"}


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, 2) for kind in SERVED), ("LlamaForCausalLM", 1)]
)
@pytest.mark.parametrize("system", ["vllm", "sglang"])
def test_a_server_s_taps_are_those_of_transformers(kind, system, size, tmp_path, capsys):
    model, section = hugging(kind), SERVED[kind][0][system]
    recorded(tmp_path / "hf", model, TOKENS)
    capsys.readouterr()
    on_ranks(Recorder, tmp_path / "served", model, system, ROWS, size)
    said = capsys.readouterr().err
    line = rf"\[graft\] taps of {kind}: {section}, \d+ of {rows_of(section)} rows fit\n"
    assert re.fullmatch(f"({line}){{{size}}}", said), said
    made, taps = Recording.open(tmp_path / "served"), served_taps(kind, system)
    check(made, taps | {"next_logits"})
    assert agreeing(tmp_path / "hf", made.path) == taps


@pytest.mark.parametrize(
    ("rows", "size"), [(ROW, 1), (ROW, 2), (ROWS, 2)], ids=["one", "one-tp2", "two-tp2"]
)
@pytest.mark.parametrize("system", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_recording_of_transformers_is_grafted_onto_a_server(kind, system, size, rows, tmp_path):
    model = hugging(kind)
    recorded(tmp_path / "hf", model, torch.stack(rows))
    taps = served_taps(kind, system)
    for session in on_ranks(Replayer, tmp_path / "hf", model, system, rows, size):
        log = session.log()
        grafted = log.filter(log["name"] != "next_logits")
        assert set(grafted["outcome"]) == {"grafted"}, set(grafted["message"])
        assert set(grafted["name"]) == taps and grafted["rel_diff"].max() < 1e-12


@pytest.mark.parametrize("system", ["vllm", "sglang"])
def test_a_recording_of_a_server_is_grafted_onto_transformers(system, tmp_path):
    model = hugging("Qwen3ForCausalLM")
    on_ranks(Recorder, tmp_path / "served", model, system, ROWS, 2)
    # The stand-in's ranks add up one by one, and so differ in the last bit.
    with Replayer(tmp_path / "served", taps="auto", replicas="first") as session, torch.no_grad():
        model(TOKENS)
    log = session.log()
    grafted = log.filter(log["outcome"] == "grafted")
    assert set(grafted["name"]) == served_taps("Qwen3ForCausalLM", system)
    assert grafted["rel_diff"].max() < 1e-12 and "error" not in set(log["outcome"])


@pytest.mark.parametrize("system", ["vllm", "sglang"])
def test_ranks_of_a_server_that_share_a_key_head(system, tmp_path):
    model = hugging("LlamaForCausalLM", num_key_value_heads=1)
    recorded(tmp_path / "hf", model, TOKENS)
    for session in on_ranks(Replayer, tmp_path / "hf", model, system, ROWS, 2):
        log = session.log()
        shared = log.filter(log["name"].is_in(["k", "v", "k_rope"]))
        assert set(shared["outcome"]) == {"grafted"} and len(shared) == 3 * LAYERS
        assert shared["rel_diff"].max() < 1e-12
    on_ranks(Recorder, tmp_path / "served", model, system, ROWS, 2)
    assert "k_rope" in agreeing(tmp_path / "hf", tmp_path / "served")


def norm_eps(layer):
    layer.post_attention_layernorm.variance_epsilon = 0.5


def wrong_scale(layer):
    layer.self_attn.attn.scale *= 2


def wrong_act(layer):
    def forward(x):
        gate, up = x.chunk(2, -1)
        return nn.functional.gelu(gate) * up

    layer.mlp.act_fn.forward = forward


def wrong_heads(layer):
    weight = layer.self_attn.qkv_proj.weight
    weight.data[: len(weight) // 4] *= 1.5


FAULTS = {"mlp_norm": norm_eps, "attn_ctx": wrong_scale, "mlp_act": wrong_act, "q": wrong_heads}


@pytest.mark.parametrize("system", ["vllm", "sglang"])
@pytest.mark.parametrize("tap", FAULTS)
def test_a_fault_planted_in_a_server_shows_at_its_own_tap_alone(tap, system, tmp_path):
    model = hugging("LlamaForCausalLM")
    recorded(tmp_path / "hf", model, TOKENS)

    def plant(one):
        FAULTS[tap](one.model.layers[1])

    for session in on_ranks(Replayer, tmp_path / "hf", model, system, ROWS, 2, plant):
        log = session.log()
        wrong = log.filter(log["rel_diff"] > 1e-10)
        assert set(wrong.select("name", "tags").iter_rows()) == {(tap, '{"layer":1}')}


def megatron(stage=0, stages=1):
    torch.manual_seed(stage)
    return te_spec.GPTModel(stage, stages).eval()


def test_norms_that_are_inside_of_linear_layers_are_not_the_residual(run, capsys):
    model = megatron()
    made = recorded(run, model, TOKENS)
    check(made, LLAMA - {"attn_norm", "mlp_norm"})
    assert len(capsys.readouterr().err.splitlines()) == 1, "nothing of rows that tap no norm"
    with Replayer(run, taps="auto") as session, torch.no_grad():
        model(TOKENS)
    log = session.log()
    assert set(log["outcome"]) == {"grafted"} and log["rel_diff"].max() == 0


def test_the_layers_of_a_pipeline_s_stages_have_their_numbers_in_all_of_it(run):
    received = None
    for stage in range(2):
        model = megatron(stage, 2)
        with Recorder(run, taps="auto", rank=stage, world_size=2), torch.no_grad():
            received = model(TOKENS, received)
    rows = Recording.open(run).rows()
    for rank, layers in enumerate([(0, 1), (2, 3)]):
        tags = rows.filter((rows["rank"] == rank) & ~rows["name"].is_in(ONCE))["tags"]
        assert set(tags) == {f'{{"layer":{layer}}}' for layer in layers}


@pytest.mark.processes
@pytest.mark.parametrize("stages", [1, 2])
def test_megatron_with_experts(stages, shell):
    for name in ("megatron", "megatron.core"):
        if util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed, of the extra `systems`")
    job = Path(__file__).parents[2] / "jobs" / "systems" / "megatron_moe.py"
    done = shell(
        shell.graft, "record", "-o", "run", "--taps", "auto", "--", shell.torchrun(stages), job
    )
    assert done.returncode == 0, done.stderr
    assert "tapped nothing" not in done.stderr and "not tapped" not in done.stderr
    rows = Recording.open(shell.folder / "run").rows()
    layers = defaultdict(set)
    for row in rows.iter_rows(named=True):
        layers[row["name"]].add(row["tags"])
        if row["name"] == "router":
            assert row["dims"] == "s[sp] b e" and row["shape"] == [6, 2, 4]
    every = [f'{{"layer":{i}}}' for i in range(4)]
    assert set(layers) == SPARSE | QK_NORMS | {"gate", "up", "mlp_act"}
    for name, tags in layers.items():
        expected = {"router": every[:3], "gate": every[3:], "up": every[3:], "mlp_act": every[3:]}
        assert sorted(tags) == (["{}"] if name in ONCE else expected.get(name, every)), name
