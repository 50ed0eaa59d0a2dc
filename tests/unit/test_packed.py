"""All trees of a micro-batch in one row: equal to the padded rows in every architecture, by the CPU's form of the kernel. FlexAttention
has no backward pass there and is compared forwards; tests/gpu has both kernels themselves.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from prefopt.config.schema import SamplerConfig, TrustConfig
from prefopt.data.batch import Row, build
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.policies import packed
from prefopt.policies.reference import make_reference
from prefopt.policies.reward_model import RewardModel
from prefopt.policies.trees import plant
from tests import toy
from tests.toy import data_config, model_config, policy, save_model
from tests.unit.test_trees import LORA, alike, batch, gradients, plain, rows, stir

# Beside toy.FAMILIES: layers of two kinds without Gemma's peculiarities, no rotation in every other layer, one head of keys for all.
MORE = {
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [0, 1]}),
    "gemma": ("Gemma", {"head_dim": 8, "num_key_value_heads": 1}),
}
FAMILIES = [*toy.FAMILIES, *MORE]
UNCAPPED = [family for family in FAMILIES if family != "gemma2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str):
        if family not in made:
            with pytest.MonkeyPatch.context() as patch:
                for name, entry in MORE.items():
                    patch.setitem(toy.FAMILIES, name, entry)
                made[family] = save_model(root / family, family)
        return made[family]

    return folder


def reward_model(folder, lora=None, **settings):
    return RewardModel(model_config(folder, lora, **settings), data_config(), TrustConfig(), torch.device("cpu"), "fp32", 0)


@pytest.fixture
def flex(monkeypatch):
    """A policy in packed rows under FlexAttention, which is not compiled here."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)

    def switched(p):
        p.kernel = "flex"
        p.layout, p.share = "packed", True
        return p

    return switched


# ---- equal to padded rows ----


@pytest.mark.parametrize("family", UNCAPPED)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_varlen_equals_padded_rows_in_every_family(family, folders, lora, checkpointing):
    p = policy(folders(family), attention="varlen", lora=lora, gradient_checkpointing=checkpointing)
    assert p.scoring == "shared prompts packed (varlen), chunked logits" and p.layout == "packed"
    p = stir(p).double().train()
    micro = batch(p, rows(0, [2, 1, 5, 3]))
    upstream = torch.linspace(-1, 1, int(micro.layout.lengths.sum()))
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    slow, slow_gradients = plain(p)(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    alike(fast_gradients, slow_gradients)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_flex_equals_padded_rows_in_every_family(family, folders, lora, flex):
    p = flex(stir(policy(folders(family), attention="auto", lora=lora)).eval())
    micro = batch(p, rows(0, [2, 1, 5, 3]))
    assert p.inner.config._attn_implementation == "prefopt_flex"
    torch.testing.assert_close(p(micro), plain(p)(micro), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3"])
def test_rewards_and_their_gradients_equal_those_of_padded_rows(family, folders, lora, attention):
    p = stir(reward_model(folders(family), lora, attention=attention)).double().train()
    p.inner.score.float()
    assert p.scoring == {"sdpa": "shared prompts in trees (sdpa)", "varlen": "shared prompts packed (varlen)"}[attention]
    micro = batch(p, rows(0, [2, 1, 5, 3]))
    upstream = torch.linspace(-1, 1, 11) * 30  # a fresh head is small
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    p.layout = "rows"
    slow, slow_gradients = p(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=0)  # the head is computed in fp32
    assert slow.unique().numel() == 11
    alike(fast_gradients, slow_gradients)


def test_packed_without_sharing_equals_padded_rows(folders):
    p = policy(folders("mistral"), attention="varlen", share_prompts=False).double().eval()
    assert p.scoring == "repeated prompts packed (varlen), chunked logits"
    micro = batch(p, rows(0, [2, 1, 5, 3]))
    upstream = torch.linspace(-1, 1, int(micro.layout.lengths.sum()))
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    slow, slow_gradients = plain(p)(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    alike(fast_gradients, slow_gradients)


def test_under_autocast_the_kernel_gets_one_type(folders, monkeypatch):
    """Rotations leave queries and keys in fp32 beside values in bf16."""
    seen, real = [], packed.one_by_one
    monkeypatch.setattr(packed, "one_by_one", lambda q, k, v, *a, **kw: seen.append((q.dtype, k.dtype, v.dtype)) or real(q, k, v, *a, **kw))
    p = toy.CausalLM(model_config(folders("llama"), attention="varlen"), data_config(), TrustConfig(), torch.device("cpu"), "bf16", 0)
    assert p.layout == "packed" and set(seen) == {(torch.bfloat16,) * 3}
    micro = batch(p, rows(0, [2, 3]))
    p(micro).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(p(micro), plain(p)(micro), atol=0.2, rtol=0.1)


def test_references_score_as_the_packed_policy(folders):
    for lora in (None, LORA):
        p = policy(folders("llama"), attention="varlen", lora=lora).eval()
        micro = batch(p, rows(0, [2, 3]))
        assert torch.equal(make_reference(p, "initial")(micro), p(micro).detach())
    assert torch.equal(copy.deepcopy(p)(micro), p(micro))


# ---- the shape of a batch ----


def layouts(p, how: str):
    p.layout, p.share = how, True
    return p


@pytest.mark.parametrize("how", ["trees", "packed"])
@pytest.mark.parametrize("counts", [[1], [2], [5], [2, 2, 2], [1, 1, 1], [5, 1, 2]], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_shape_of_batch(how, counts, family, folders):
    p = policy(folders(family), attention="varlen").double().eval()
    for seed in range(3):
        micro = batch(p, rows(seed, counts))
        with torch.no_grad():
            fast = layouts(p, how)(micro)
            torch.testing.assert_close(fast, layouts(p, "rows")(micro), atol=1e-12, rtol=0)


def of(prompt: list[int], *replies: list[int]) -> Row:
    """Without a prompt a reply's first token is not trained, as the tokeniser has it."""
    branches = [Branch(r, [bool(prompt), *[True] * (len(r) - 1)], True) for r in replies]
    return Row(Tokens(prompt, branches), "group", scores=[float(i) for i in range(len(replies))])


@pytest.mark.parametrize("how", ["trees", "packed"])
@pytest.mark.parametrize("made", [
    [of([], [1, 2, 3], [4, 5])], [of([], [1, 2]), of([7, 8], [3, 4], [5]), of([], [6, 7, 8], [9, 10], [11, 12])],
    [of([7], [3], [4])] * 3, [of([7], [3])], [of([5, 6, 7], [1, 2], [1, 2], [3])] * 4, [of([2] * 40, [3], [4] * 40, [5])],
], ids=["no prompt", "some without a prompt", "one token of everything", "one token", "one prompt for all rows", "uneven"])
def test_edges_of_all_sorts(how, made, folders):
    p = layouts(policy(folders("llama"), attention="varlen").double().eval(), how)
    micro = batch(p, made)
    upstream = torch.linspace(-1, 2, int(micro.layout.lengths.sum()))
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    slow, slow_gradients = plain(p)(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    alike(fast_gradients, slow_gradients)


@torch.no_grad()
def test_edges_left_out_leave_their_tree(folders):
    """The second pass of a coupled objective scores only some edges; a tree may lose its first."""
    p = policy(folders("llama"), attention="varlen").double().eval()
    micro = batch(p, rows(4, [3, 2]))
    keep = torch.tensor([False, True, True, False, True])
    whole = p(micro)[keep[micro.layout.token_edge]]
    torch.testing.assert_close(p(micro.only(keep)), whole, atol=1e-12, rtol=0)


def test_layout_of_a_packed_row():
    made = [of([1, 2, 3], [4, 5], [6]), of([7], [8]), of([], [9, 1], [2, 3])]
    micro = build(made, [0, 1, 2], "groups", 0)
    trees = plant(micro, 0, packed=True)
    assert trees.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]] and micro.tree_tokens == 12
    assert trees.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 0, 1]]
    assert trees.branch.tolist() == [[0, 0, 0, 1, 1, 2, 0, 1, 1, 1, 2, 2]]
    assert trees.tree.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert trees.predict.tolist() == [2, 3, 2, 6, 8, 10] and trees.last.tolist() == [4, 5, 7, 9, 11]
    s = packed.sequences(trees)
    assert s.queries.tolist() == [0, 5, 6, 8, 10, 12] and s.keys.tolist() == [0, 5, 9, 11, 13, 15]
    assert s.queries.dtype == s.keys.dtype == torch.int32 and (s.most_queries, s.most_keys) == (5, 5)
    assert s.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    alone = plant(micro, 0, packed=True, share=False)
    assert alone.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 1, 2, 3]] and alone.tree.unique().numel() == 5
    assert packed.sequences(alone).gather is None, "keys that are the row itself are not copied"


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("takes", [packed.takes(), packed.takes() - {"enable_gqa"}], ids=["", "torch 2.11"])
def test_the_sequences_of_the_kernel_are_the_mask_of_the_row(takes, window, monkeypatch):
    """Softmax over all that `allowed` lets through, in float64, with a head of keys for every two of queries."""
    monkeypatch.setattr(packed, "takes", lambda: takes)
    micro = build([of([1, 2, 3, 4, 5], [6, 7, 8], [9], [1, 2, 3, 4]), of([], [2, 3], [4, 5]), of([1], [2])], [0, 1, 2], "groups", 0)
    trees = plant(micro, 0, packed=True)
    allowed, s = trees.allowed(window)[0], packed.sequences(trees)
    torch.manual_seed(0)
    width = trees.input_ids.shape[1]
    q, k, v = (torch.randn(width, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    made = packed.varlen(q, k[s.gather], v[s.gather], s, 0.7, window)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.7
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(made, torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1)))


# ---- rows and siblings leave one another alone ----


def other(row: Row, seed: int) -> Row:
    """Other tokens in a row of the same shape."""
    rng = random.Random(seed)

    def drawn(ids):
        return [rng.randrange(90) for _ in ids]

    branches = [Branch(drawn(b.ids), b.mask, True) for b in row.tokens.branches]
    return Row(Tokens(drawn(row.tokens.prompt), branches), "group", scores=row.scores)


@torch.no_grad()
@pytest.mark.parametrize("how", ["rows", "trees", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3", "smollm3"])
def test_a_row_never_changes_another_rows_log_probs_by_a_bit(how, family, folders):
    """Trap: what stands beside a row in its micro-batch must not reach it."""
    p = layouts(policy(folders(family), attention="varlen").eval(), how)
    made = rows(1, [3, 2, 4])
    tokens = [sum(b.trained for b in r.tokens.branches) for r in made]
    before = p(batch(p, made)).split(tokens)
    after = p(batch(p, [made[0], other(made[1], 5), made[2]])).split(tokens)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]) and not torch.equal(before[1], after[1])


@torch.no_grad()
@pytest.mark.parametrize("how", ["trees", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_completion_never_changes_its_siblings_log_probs_by_a_bit(how, family, folders):
    p = layouts(policy(folders(family), attention="varlen").eval(), how)
    (row,) = rows(3, [3])
    tokens = [b.trained for b in row.tokens.branches]
    before = p(batch(p, [row])).split(tokens)
    row.tokens.branches[1] = other(row, 5).tokens.branches[1]
    after = p(batch(p, [row])).split(tokens)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]) and not torch.equal(before[1], after[1])


# ---- sampling and saving know nothing of it ----


def test_sampling_runs_on_a_kernel_with_a_cache(folders, flex):
    folder = folders("mistral")
    prompts, settings = [[5, 6, 7], [8, 9, 10, 11, 12]], SamplerConfig(max_new_tokens=12, temperature=1.0)
    wanted = [r.ids for r in policy(folder, attention="sdpa").generate(prompts, settings, seed=3)]
    p = policy(folder, attention="varlen")
    micro = batch(p, rows(0, [2]))
    for switched in (lambda p: p, flex):
        with torch.no_grad():
            before = switched(p)(micro)
            assert [r.ids for r in p.generate(prompts, settings, seed=3)] == wanted
            assert p.inner.config._attn_implementation == f"prefopt_{p.kernel}" and torch.equal(p(micro), before)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("make", [policy, reward_model], ids=["policy", "reward model"])
def test_a_saved_model_names_no_kernel_of_ours(make, lora, folders, tmp_path):
    make(folders("llama"), lora, attention="varlen").save(tmp_path)
    written = [f.read_text() for f in tmp_path.glob("*.json")]
    assert written and not any("prefopt_varlen" in text for text in written)
    card = tmp_path / "prefopt_reward.json"
    assert not card.exists() or json.loads(card.read_text())["model"]["attention"] == "auto"


# ---- which kernel ----

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def config(**values):
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=64, num_attention_heads=4, **values)


@pytest.mark.parametrize(("settings", "device", "precision", "dropout", "kernel"), [
    ({}, CUDA, "bf16", 0.0, "varlen"), ({"sliding_window": 8}, CUDA, "bf16", 0.0, "varlen"),
    ({"attn_logit_softcapping": 50.0}, CUDA, "bf16", 0.0, "flex"), ({"head_dim": 260}, CUDA, "bf16", 0.0, "flex"),
    ({}, CUDA, "bf16", 0.1, None), ({}, CUDA, "fp32", 0.0, None), ({}, CPU, "bf16", 0.0, "varlen"), ({}, CPU, "fp32", 0.0, "varlen"),
    ({}, CPU, "fp32", 0.1, None), ({"attn_logit_softcapping": 50.0}, CPU, "fp32", 0.0, None),
])  # fmt: skip
def test_auto(settings, device, precision, dropout, kernel, monkeypatch):
    monkeypatch.setattr(packed, "has_varlen", lambda device: True)
    assert packed.packed_kernel(config(**settings), "auto", device, precision, dropout) == kernel
    for named in ("sdpa", "eager", "flash_attention_2"):
        assert packed.packed_kernel(config(**settings), named, device, precision, dropout) is None
    monkeypatch.setattr(packed, "has_varlen", lambda device: False)
    without = "flex" if device == CUDA else "varlen"
    assert packed.packed_kernel(config(**settings), "auto", device, precision, dropout) == (kernel and without)


@pytest.mark.parametrize(("attention", "device", "precision", "dropout", "has", "reason"), [
    ("varlen", CUDA, "fp32", 0.0, True, "computes in bf16 on a GPU; set hardware.precision=bf16"),
    ("varlen", CUDA, "bf16", 0.0, False, "needs torch 2.11"), ("flex", CPU, "fp32", 0.0, True, "flex needs a GPU"),
    ("varlen", CUDA, "bf16", 0.1, True, "has no dropout; set model.dropout=0"),
    ("flex", CUDA, "bf16", 0.1, True, "has no dropout; set model.dropout=0"),
])  # fmt: skip
def test_a_kernel_that_cannot_run_is_refused(attention, device, precision, dropout, has, reason, monkeypatch):
    monkeypatch.setattr(packed, "has_varlen", lambda device: has)
    with pytest.raises(UserError, match=reason):
        packed.packed_kernel(config(), attention, device, precision, dropout)


def test_a_model_that_caps_its_scores_needs_no_setting(folders):
    p = policy(folders("gemma2"), attention="auto")
    assert p.scoring == "shared prompts in trees (eager), chunked logits"
    with pytest.raises(UserError, match="which model.attention=varlen does not; set model.attention=auto"):
        policy(folders("gemma2"), attention="varlen")


# ---- what cannot be served is not used, and said ----


def test_a_kernel_that_is_wrong_falls_back_to_trees(folders, monkeypatch, capsys):
    real = packed.one_by_one
    monkeypatch.setattr(packed, "one_by_one", lambda *a, window_size, **kw: real(*a, window_size=(3, 0), **kw))
    for make in (policy, reward_model):
        p = make(folders("llama"), attention="varlen")
        assert p.layout == "trees" and p.scoring.startswith("shared prompts in trees (sdpa)")
        assert p.inner.config._attn_implementation == "sdpa"
        assert "model: model.attention=varlen is off for this model (" in capsys.readouterr().err


def test_a_model_whose_prompts_cannot_be_shared_is_packed_without(folders, monkeypatch, capsys):
    """One whose positions are columns of the row would be; here sharing itself is spoilt, in both layouts."""
    from prefopt.policies import layout

    def spoilt(micro, pad, packed=False, share=True):
        trees = plant(micro, pad, packed, share)
        trees.positions += share
        trees.positions[trees.branch == 0] += int(share) * 5
        return trees

    monkeypatch.setattr(layout, "plant", spoilt)
    p = policy(folders("llama"), attention="varlen")
    assert p.scoring == "repeated prompts packed (varlen), chunked logits"
    said = capsys.readouterr().err
    assert "model.attention=varlen is off" in said and "model.share_prompts is off" in said


def test_a_kernel_that_fails_leaves_padded_rows(folders, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no such kernel on this machine")

    monkeypatch.setattr(packed, "one_by_one", fails)
    p = policy(folders("llama"), attention="varlen", share_prompts=False)
    assert p.scoring == "repeated prompts in rows (sdpa), chunked logits"
    assert "model.attention=varlen is off for this model (RuntimeError: no such kernel on this machine)" in capsys.readouterr().err
    assert p(batch(p, rows(0, [2]))).isfinite().all()


@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"softcap": 50.0}, {"s_aux": torch.zeros(4)}], ids=lambda s: next(iter(s)))
def test_what_the_kernel_would_leave_out_is_refused(setting):
    t = torch.zeros(1, 4, 3, 8)
    with pytest.raises(NotImplementedError, match=f"has no {next(iter(setting))}"):
        packed._varlen_attention(nn.Identity(), t, t, t, None, **setting)


def test_layers_of_other_kinds_are_refused():
    trees = plant(build([of([1], [2])], [0], "groups", 0), 0, packed=True)
    other = config()
    other.layer_types = ["full_attention", "chunked_attention"]
    for kernel in packed.KERNELS:
        with pytest.raises(NotImplementedError, match="layers of kind chunked_attention"):
            packed.inputs(trees, other, kernel)


def test_the_bench_of_kernels_runs(tmp_path, capsys):
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench_attention.py"
    spec = importlib.util.spec_from_file_location("bench_attention", script)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    out = tmp_path / "attention.json"
    args = ["--shape", "tiny", "--layers", "1", "--mix", "hh", "--budget", "500", "--batches", "1", "--repeats", "1", "--out", str(out)]
    assert bench.main(args) == 0
    (result,) = json.loads(out.read_text())["results"]
    expected = set(bench.WAYS) if torch.cuda.is_available() else set(bench.WAYS) - {"packed flex"}
    assert set(result["ways"]) == expected and result["tree_tokens"] < result["tokens"] < result["padded_tokens"]
    printed = capsys.readouterr().out
    assert all(f"| hh | {way} |" in printed for way in expected)
