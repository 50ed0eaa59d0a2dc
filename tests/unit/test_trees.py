"""Prompts computed once give the log-probs and gradients of every completion run apart, for every architecture and any shape of batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from prefopt.data.batch import Row, build
from prefopt.data.tokenise import Branch, Tokens
from prefopt.policies.trees import plant
from tests.toy import policy, save_model
from tests.unit.test_families import ATTENTION, FAMILIES

LORA = {"enabled": True, "r": 4}


def rows(seed: int, counts: list[int], long: int = 30, vocabulary: int = 90) -> list[Row]:
    """Rows with so many completions each; some tokens are not trained, some completions are one token."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(1, most))]

    made = []
    for count in counts:
        replies = [ids(rng.choice([1, long])) for _ in range(count)]
        branches = [Branch(r, [rng.random() < 0.8 for _ in r[:-1]] + [True], True) for r in replies]
        made.append(Row(Tokens(ids(long), branches), "group", scores=[float(i) for i in range(count)]))
    return made


def batch(p, made: list[Row], chosen=None):
    return build(made, range(len(made)) if chosen is None else chosen, "groups", p.pad)


def gradients(p, micro, upstream) -> dict[str, torch.Tensor]:
    p.zero_grad()
    (p(micro) * upstream).sum().backward()
    return {name: w.grad.clone() for name, w in p.trainable().items()}


def alike(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Gradients of float64 weights: norms are computed in fp32 whatever the rest is, which leaves 1e-7 of a weight's gradient."""
    assert made.keys() == wanted.keys() and sum(g.norm() for g in wanted.values()) > 1
    for name, gradient in wanted.items():
        assert (made[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


def plain(p):
    """The same policy by the plain way."""
    p.layout, p.fuse = "rows", False
    return p


def stir(p):
    """The policy with adapters that are no longer the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, w in p.trainable().items():
            if "lora_B" in name:
                w.normal_(0, 0.3)
    return p


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / family, family)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_equal_to_the_plain_path_in_every_family(family, folder, lora, checkpointing):
    """Prompts and completions are longer than the sliding windows of these models."""
    p = policy(folder, attention=ATTENTION.get(family, "sdpa"), lora=lora, gradient_checkpointing=checkpointing)
    assert p.layout == "trees" and p.share and p.fuse, "these architectures are served"
    wide = p.attention != "eager"  # transformers' masks for that kernel overflow its softmax in fp32 if the rest is float64
    stir(p).to(torch.float64 if wide else torch.float32).train()
    micro = batch(p, rows(0, [2, 1, 5, 3]))
    upstream = torch.linspace(-1, 1, int(micro.layout.lengths.sum()))
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    slow, slow_gradients = plain(p)(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=1e-12 if wide else 1e-5, rtol=0)
    alike(fast_gradients, slow_gradients, 1e-6 if wide else 1e-4)


@pytest.mark.parametrize("counts", [[1], [2], [5], [2, 2, 2], [1, 1, 1], [5, 1, 2]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_any_shape_of_batch(counts, seed, tmp_path):
    p = policy(save_model(tmp_path, "llama")).eval()
    micro = batch(p, rows(seed, counts))
    with torch.no_grad():
        fast = p(micro)
        torch.testing.assert_close(fast, plain(p)(micro), atol=2e-5, rtol=1e-5)


def test_one_prompt_for_all_rows_and_one_token_of_everything(tmp_path):
    p = policy(save_model(tmp_path, "llama")).eval()
    one = Row(Tokens([7], [Branch([3], [True], True), Branch([4], [True], True)]), "group", scores=[0.0, 1.0])
    with torch.no_grad():
        made = p(batch(p, [one, one, one]))
        torch.testing.assert_close(made, plain(p)(batch(p, [one, one, one])), atol=2e-5, rtol=1e-5)
    assert made[0::2].unique().numel() == made[1::2].unique().numel() == 1


@torch.no_grad()
def test_a_row_never_changes_another_rows_log_probs(family, folder):
    p = policy(folder, attention=ATTENTION.get(family, "sdpa")).eval()
    made, other = rows(1, [3, 2, 4]), rows(2, [3, 2, 4])
    tokens = [int(sum(b.trained for b in r.tokens.branches)) for r in made]
    before = p(batch(p, made)).split(tokens)
    after = p(batch(p, [made[0], other[1], made[2]])).split([tokens[0], sum(b.trained for b in other[1].tokens.branches), tokens[2]])
    for place in (0, 2):
        torch.testing.assert_close(before[place], after[place], atol=1e-5, rtol=1e-5)
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
def test_a_completion_never_changes_its_siblings_log_probs(family, folder):
    p = policy(folder, attention=ATTENTION.get(family, "sdpa")).eval()
    (row,) = rows(3, [3])
    tokens = [b.trained for b in row.tokens.branches]
    before = p(batch(p, [row])).split(tokens)
    row.tokens.branches[1] = Branch([5, 6, 7, 8], [True] * 4, True)
    after = p(batch(p, [row])).split([tokens[0], 4, tokens[2]])
    for place in (0, 2):
        torch.testing.assert_close(before[place], after[place], atol=1e-5, rtol=1e-5)


def test_layout_of_a_tree():
    made = [Row(Tokens([1, 2, 3], [Branch([4, 5], [True, True], True), Branch([6], [True], True)]), "group", scores=[0.0, 1.0]),
            Row(Tokens([7], [Branch([8], [True], True)]), "group", scores=[0.0])]
    trees = plant(build(made, [0, 1], "groups", 0), 0)
    assert trees.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]
    assert trees.positions.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 0, 0, 0, 0]]
    assert trees.branch.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, -1, -1, -1, -1]]
    assert trees.predict.tolist() == [2, 3, 2, 6]  # both replies' first tokens are predicted by the last prompt token
    assert trees.last.tolist() == [4, 5, 7]
    seen = trees.allowed()[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert trees.allowed(2)[0, 0].int().tolist()[5] == [0, 0, 1, 0, 0, 1]  # a window of two, counted in positions


def test_edges_left_out_leave_their_tree(tmp_path):
    """The second pass of a coupled objective scores only some edges."""
    p = policy(save_model(tmp_path, "llama")).eval()
    micro = batch(p, rows(4, [3, 2]))
    keep = torch.tensor([False, True, True, False, True])
    with torch.no_grad():
        whole = p(micro)[keep[micro.layout.token_edge]]
        torch.testing.assert_close(p(micro.only(keep)), whole, atol=1e-5, rtol=1e-5)


# ---- what cannot be served is not used, and said ----


def test_a_head_that_is_no_matrix_product_falls_back(tmp_path, capsys):
    p = policy(save_model(tmp_path, "llama"), lora=LORA | {"targets": "lm_head, q_proj", "dropout": 0.1})
    assert not p.share and not p.fuse and p.scoring == "repeated prompts in rows (sdpa), full logits"
    assert "model: model.fused_head is off for this model (TypeError: the adapter on its head has dropout)" in capsys.readouterr().err
    micro = batch(p, rows(0, [2]))
    assert p(micro).isfinite().all()


def test_a_model_that_scales_its_logits_falls_back(tmp_path, capsys, monkeypatch):
    """An architecture whose logits are not what its head gives."""
    real = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: real(self, x) * (0.5 if self.out_features > 90 else 1))
    p = policy(save_model(tmp_path, "llama"))
    assert not p.fuse and "log-probs would differ by" in capsys.readouterr().err


def test_switched_off_by_the_user(tmp_path, capsys):
    folder = save_model(tmp_path, "llama")
    capsys.readouterr()
    assert policy(folder, share_prompts=False).scoring == "repeated prompts packed (varlen), chunked logits"
    assert policy(folder, share_prompts=False, attention="sdpa").scoring == "repeated prompts in rows (sdpa), chunked logits"
    assert policy(folder, fused_head=False).scoring == "repeated prompts in rows (sdpa), full logits"
    assert " is off " not in capsys.readouterr().err
