"""Methods that are made of a data transform and an objective: F-DPO, MADPO, RA-DPO, Sem-DPO, reverse DPO."""

from __future__ import annotations

import math

import pytest
import torch
from samples import default, floats, layout_of, scored, settings_of

from prefopt.config.catalogue import brings
from prefopt.data.records import Completion, Example, Message
from prefopt.data.sources import Split
from prefopt.data.transforms import apply_transforms
from prefopt.objectives.base import Batch, Pairs, reduce_terms, total_weights
from prefopt.objectives.margin_weighted import MADPO, FactualityDPO
from prefopt.objectives.pairwise import DPO
from tests.toy import data_config

TAU = math.log(0.999 / 0.001)


def said(role: str, text: str) -> Message:
    return Message(role, [{"type": "text", "text": text}], train=role == "assistant")


def pair(chosen: float, rejected: float) -> Example:
    """Two replies, each of which is its own score."""
    completions = [Completion([said("assistant", f"{s:g}")], score=s) for s in (chosen, rejected)]
    return Example([said("user", "q")], completions, kind="pair", origin=f"{chosen:g} over {rejected:g}")


def transformed(rows: list[Example], **transforms) -> list[Example]:
    split = Split("train", rows)
    apply_transforms([split], data_config(transforms=transforms), seed=0)
    return split.examples


def batch_of(objective, rows: list[Example], logp: torch.Tensor, reference: torch.Tensor) -> Batch:
    """The pairs of `rows` over a table [goals, replies] of log-probs: an edge for each of its entries, the reply y of score y + 1 under the
    goal that the row's first message names (1 where there is none)."""
    goals, replies = logp.shape

    def edge(e: Example, side: int) -> int:
        goal = int(e.prompt[0].text) - 1 if len(e.prompt) > 1 else 0
        return goal * replies + int(e.completions[side].text) - 1

    sides = [torch.tensor([edge(e, side) for e in rows]) for side in (0, 1)]
    columns = [floats(getattr(e, name) for e in rows) for name in ("label", "weight", "margin")]
    layout = layout_of([1] * (goals * replies), pairs=Pairs(*sides, *columns))
    return scored(objective, layout, {"policy": logp.flatten(), "reference": reference.flatten()})


def loss_of(objective, rows: list[Example], logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    batch = batch_of(objective, rows, logp, reference)
    return reduce_terms(batch, objective(batch), total_weights(objective, batch))[0]


def uniform(goals: int, replies: int) -> torch.Tensor:
    return torch.zeros(goals, replies, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize(("slug", "brought"), [
    ("f_dpo", {"transforms": "factuality"}), ("madpo", {"transforms": "reward_margin", "stages": "reward"}),
    ("ra_dpo", {"transforms": "reward_augment"}), ("sem_dpo", {"transforms": "similarity_weight"}),
])
def test_each_method_brings_its_transform(slug, brought):
    assert brings(slug) == brought
    cls, _ = settings_of(slug)
    assert cls is {"f_dpo": FactualityDPO, "madpo": MADPO}.get(slug, DPO)


# ---- MADPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("g", "want"), [(1, 1.203655), (-1, 0.446409), (10, 0.995237), (TAU, 1.0), (-TAU - 1e-9, 1.0), (0, 1.0)])
def test_weights_of_madpo(g, want):
    assert MADPO(tau=TAU).weight(floats([g])).item() == pytest.approx(want, abs=1e-6)


def test_madpo_stretches_small_margins_and_shrinks_large_ones():
    """c = 1.991881 at g = 1, read back from the weight: sigmoid(c g) = w sigmoid(g)."""
    won = MADPO(tau=TAU).weight(floats([1.0])) * torch.sigmoid(floats([1.0]))
    assert torch.logit(won).item() == pytest.approx(1.991881, abs=1e-6)
    g = torch.linspace(0.1, 15, 300, dtype=torch.float64)
    w = MADPO(tau=TAU).weight(g)
    assert (w[g < TAU] > 1).all() and (w[g > TAU] < 1).all() and (MADPO(tau=TAU).weight(-g[g < TAU]) < 1).all()


def test_the_weight_has_no_jump():
    objective = MADPO(tau=TAU)
    for at in (-TAU, TAU, 0.0):
        near = objective.weight(floats([at - 1e-7, at, at + 1e-7]))
        assert near.max() - near.min() < 1e-5
    far = objective.weight(floats([-1e4, -100, 100, 1e4]))
    assert far.tolist() == pytest.approx([1, 1, 1, 1], abs=1e-9)


def test_madpo_without_stretching_is_dpo():
    g = floats([-20, -1, 0, 1, 20])
    for settings in ({"c_max": 1.0, "c_min": 1.0}, {"c_max": 1.0}, {"c_min": 1.0}):
        assert MADPO(**settings).weight(g).tolist() == [1] * 5
    nearly = MADPO(c_max=1 + 1e-9, c_min=1 - 1e-9).weight(g)
    assert nearly.tolist() == pytest.approx([1] * 5, abs=1e-7)


def test_the_margin_gets_no_gradient_from_madpo():
    objective, logits = MADPO(), torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    batch = batch_of(objective, [pair(3, 1)], logits.log_softmax(-1), uniform(1, 3))
    batch.pairs.margin.requires_grad_()
    loss, _ = reduce_terms(batch, objective(batch), {"preference": 1.0})
    own, of_margin = torch.autograd.grad(loss, [logits, batch.pairs.margin], allow_unused=True)
    assert own.any() and of_margin is None


def test_margins_come_from_scores_with_their_sign():
    rows = transformed([pair(5, 2), pair(1, 4)], margin={})
    assert [e.margin for e in rows] == [3, -3]
    start = uniform(1, 5)
    weights = MADPO(tau=TAU).weight(floats([3, -3]))
    assert loss_of(MADPO(tau=TAU), rows, start, start).item() == pytest.approx(math.log(2) * weights.mean().item())


# ---- DPO on rows that a transform made ---------------------------------------------------------------------------------


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, for values that all differ."""
    ranks = [[sorted(values).index(v) for v in values] for values in (a, b)]
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (len(a) * (len(a) ** 2 - 1))


def test_who_is_asked_for_a_score_learns_to_give_it():
    rows = transformed([pair(a, b) for a in range(2, 11) for b in range(1, a)], reward_augment={"template": "{goal}"})
    assert len(rows) == 90
    logits, start = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True), uniform(10, 10)
    optimizer, objective = torch.optim.Adam([logits], lr=0.1), DPO(beta=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(objective, rows, logits.log_softmax(-1), start).backward()
        optimizer.step()
    given = (logits.detach().softmax(-1) * torch.arange(1, 11)).sum(-1).tolist()
    assert rank_correlation(list(range(1, 11)), given) > 0.8
    assert given[-1] > 8.5 and given[0] < 2.5


def test_two_copies_with_one_goal_cancel():
    rows = transformed([pair(3, 3.0)], reward_augment={"template": "{goal}"})
    rows[1].completions[0] = rows[0].completions[1] = Completion([said("assistant", "2")], score=3.0)
    logits, objective = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True), default("ra_dpo")
    (both,) = torch.autograd.grad(loss_of(objective, rows, logits.log_softmax(-1), uniform(3, 3)), logits)
    (one,) = torch.autograd.grad(loss_of(objective, rows[:1], logits.log_softmax(-1), uniform(3, 3)), logits)
    assert both.abs().max() < 1e-15 < one.abs().max()


def test_swapped_pairs_teach_the_opposite():
    rows, table = [pair(5, 2), pair(1, 4)], torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, start = table.log_softmax(-1), uniform(1, 5)
    reverse = loss_of(DPO(), transformed(rows, swap={}), policy, start)
    mirrored = loss_of(DPO(), rows, start, policy)  # h of the other sign
    assert reverse.item() == pytest.approx(mirrored.item()) and reverse != loss_of(DPO(), rows, policy, start)


def test_the_gradient_of_a_pair_is_proportional_to_its_weight():
    rows = [pair(5, 2), pair(1, 4)]
    start, logits = uniform(1, 5), torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)

    def gradients(alpha: float) -> tuple[torch.Tensor, list[float]]:
        made = transformed(rows, similarity_weight={"alpha": alpha})
        objective = default("sem_dpo")
        batch = batch_of(objective, made, logits.log_softmax(-1), start)
        loss, _ = reduce_terms(batch, objective(batch), {"preference": 1.0})  # the sum, so that weights show
        return torch.autograd.grad(loss, logits)[0], [e.weight for e in made]

    plain, ones = gradients(0.0)
    weighted, weights = gradients(1.5)
    assert ones == [1, 1] and weights == [pytest.approx(math.exp(-1.5))] * 2  # no word is shared
    assert torch.allclose(weighted, plain * weights[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.1), (1.0, 0.0)])
def test_sem_dpo_divides_by_the_sum_of_its_weights(weights):
    """sum W loss / sum W, where the paper has sum W loss / P: the same at equal weights of 1, and another share of each pair never."""
    rows, objective = [pair(5, 2), pair(1, 4)], default("sem_dpo")
    table = torch.randn(1, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    each = [loss_of(objective, [row], table, uniform(1, 5)).item() for row in rows]
    for row, weight in zip(rows, weights, strict=True):
        row.weight = weight
    found = loss_of(objective, rows, table, uniform(1, 5)).item()
    total = sum(w * x for w, x in zip(weights, each, strict=True))
    assert found == pytest.approx(total / sum(weights), rel=1e-12)
    assert (found == pytest.approx(total / len(rows), rel=1e-6)) == (weights == (1.0, 1.0))
    for row in rows:
        row.weight *= 0.3
    assert loss_of(objective, rows, table, uniform(1, 5)).item() == pytest.approx(found, rel=1e-12)


def test_f_dpo_on_flipped_rows():
    rows = [pair(5, 2), pair(1, 4)]
    for e, (w, r) in zip(rows, [(0, 1), (1, 0)], strict=True):
        e.meta = {"chosen_hallucinated": w, "rejected_hallucinated": r}
    made = transformed(rows, factuality={})
    start = uniform(1, 5)
    assert [e.completions[0].text for e in made] == ["5", "4"]
    assert loss_of(default("f_dpo"), made, start, start).item() == pytest.approx(math.log1p(math.exp(1)))  # beta lambda_ = 1
    assert loss_of(FactualityDPO(lambda_=0.0), made, start, start).item() == pytest.approx(math.log(2))
