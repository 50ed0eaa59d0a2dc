"""Mixtures: each part is what it is alone, on rows that it reads in its own way."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from samples import default, floats, random_layout, random_rows, random_tokens, scored

from prefopt.config.catalogue import algo_info, load_yaml
from prefopt.config.mixtures import described, expanded
from prefopt.data.batch import build
from prefopt.objectives.base import Terms, reduce_terms, total_weights
from prefopt.objectives.mixture import Mixture, read_as
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.pointwise import BCO
from prefopt.objectives.unary import SFT
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.setup import make_objective
from tests.toy_runs import train

DECLARED = ("view", "quantities", "coupling", "columns", "proper_likelihood", "mismatched", "min_batch", "starts_level", "first_step",
            "formula")
MIXES = {
    "dpo+sft": [{"algo": "dpo", "weight": 0.7}, {"algo": "sft", "weight": 0.3}],
    "mpo": load_yaml("algo", "mpo")["parts"],
    "sft first": [{"algo": "sft"}, {"algo": "bco", "weight": 2}, {"algo": "hinge", "weight": 0.5, "beta": 0.2}],
    "twice": [{"algo": "dpo", "beta": 0.1}, {"algo": "dpo", "beta": 1.0, "weight": 0.1}],
    "unary": [{"algo": "kto", "lambda_D": 1.3}, {"algo": "sft", "weight": 0.1}],
    "tokens": [{"algo": "ld_dpo", "alpha": 0.3}, {"algo": "simpo", "weight": 0.2}],
    "astray": [{"algo": "discopop"}, {"algo": "apo_down"}],
    "lists": [{"algo": "dpo_pl"}, {"algo": "pro", "weight": 0.5}],
    "negative": [{"algo": "dpo"}, {"_target_": "prefopt.objectives.unary.SFT", "weight": -0.25}],
}


def mix(name: str) -> Mixture:
    return make_objective({"_target_": "prefopt.objectives.mixture.Mixture", "parts": MIXES[name]})


@pytest.mark.parametrize("name", MIXES)
def test_composition_knows_what_the_object_declares(name):
    objective = mix(name)
    info = described({"_target_": "prefopt.objectives.mixture.Mixture", "parts": MIXES[name]})
    for attribute in DECLARED:
        assert getattr(info, attribute) == getattr(objective, attribute), attribute


@pytest.mark.parametrize("name", MIXES)
def test_the_loss_is_the_weighted_sum_of_the_parts_alone(name):
    """On rows of every kind, each part on the micro-batch that is built for its own view."""
    rng, mixture = random.Random(name), mix(name)
    rows = random_rows(mixture, rng, 7)
    for row in rows:
        if row.kind == "ranking_all" and mixture.view == "pairs":  # a demonstration is its best reply, of pairs each chosen one
            row.kind, row.scores, row.tokens.branches = "pair", None, row.tokens.branches[:2]
        row.label, row.desirable = 1.0, row.desirable and [True]  # what is labelled bad is no demonstration
    leaves: dict = {}

    def loss_of(objective, view):
        micro = build(rows, range(len(rows)), view, 0, soft_labels="label" in mixture.columns)
        edges = [id(branch) for row in rows for branch in row.edges(view)]  # the same reply is another edge in another view
        lengths = micro.layout.lengths.tolist()
        assert len(edges) == len(lengths)
        tokens = {}
        for scorer in ("policy", "reference"):
            values = []
            for edge, length in zip(edges, lengths, strict=True):
                if (scorer, edge) not in leaves:
                    leaves[scorer, edge] = floats(-rng.uniform(0.05, 2) for _ in range(length)).requires_grad_(scorer == "policy")
                values.append(leaves[scorer, edge])
            tokens[scorer] = torch.cat(values)
        batch = scored(objective, micro.layout, tokens)
        return reduce_terms(batch, objective(batch), total_weights(objective, micro.layout))[0]

    def gradients(loss):
        own = [leaf for (scorer, _), leaf in leaves.items() if scorer == "policy"]
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in
                zip(own, torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True), strict=True)]

    whole = loss_of(mixture, mixture.view)
    alone = sum(part.weight * loss_of(part.objective, part.objective.view) for part in mixture.mixed)
    assert whole.item() == pytest.approx(alone.item(), rel=1e-6)
    for a, b in zip(gradients(whole), gradients(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_soft_labels_are_read_as_good_and_bad_replies():
    """As `build` reads them for an objective on single replies."""
    rng = random.Random(0)
    rows = [row for row in random_rows(DPO(), rng, 9) if row.kind == "pair"]
    assert {row.label for row in rows} >= {0.25, 0.75}
    pairs = build(rows, range(len(rows)), "pairs", 0).layout
    seen, own = read_as(pairs, "unary", "pairs").unary, build(rows, range(len(rows)), "unary", 0).layout.unary

    def table(unary):
        out: dict = {}
        for edge, good, weight in zip(unary.edge.tolist(), unary.desirable.tolist(), unary.weight.tolist(), strict=True):
            out[edge, good] = out.get((edge, good), 0) + weight
        return {key: pytest.approx(value) for key, value in out.items() if value}

    assert table(seen) == table(own)
    good = read_as(build(rows, range(len(rows)), "unary", 0).layout, "demonstrations", "unary").demonstrations
    assert {e for e, w in zip(good.edge.tolist(), good.weight.tolist(), strict=True) if w} == {e for e, d in table(own) if d}


def test_a_pair_that_is_labelled_the_other_way_round_demonstrates_its_second_reply():
    """With the label 0.2, SFT's gradient is 0.2 of that of the first reply and 0.8 of that of the second, as if these were rows."""
    mixture = Mixture([{"_target_": "prefopt.objectives.pairwise.DPO"}, {"_target_": "prefopt.objectives.unary.SFT"}])
    row = next(row for row in random_rows(DPO(), random.Random(0), 9) if row.kind == "pair")
    row.label, row.weight = 0.2, 3.0
    grads = []
    for soft in (True, False):  # without soft labels `build` makes two pairs of it
        layout = build([row], [0], "pairs", 0, soft_labels=soft).layout
        tokens = {"policy": torch.full((len(layout.token_edge),), -0.5).double().requires_grad_(), "reference": floats([-0.5] * len(
            layout.token_edge))}
        batch = scored(mixture, layout, tokens)
        term = mixture(batch).terms[1]
        total = total_weights(mixture, layout)
        assert total["sft_nll"] == pytest.approx(3 * (0.2 * layout.lengths[0] + 0.8 * layout.lengths[1]).item())
        loss = reduce_terms(batch, Terms([term]), total)[0]
        grads.append(torch.autograd.grad(loss, tokens["policy"])[0])
        of = [grads[-1][layout.token_edge == e] for e in (0, 1)]
        assert of[1].min() == of[1].max() == pytest.approx(4 * of[0].max().item()) and of[0].max() < 0
    torch.testing.assert_close(*grads)


def test_a_single_part_of_weight_one_is_that_objective():
    rng, objective = random.Random(1), DPO(beta=0.3)
    mixture = Mixture([{"_target_": "prefopt.objectives.pairwise.DPO", "beta": 0.3}])
    layout = random_layout(objective, rng, 5)
    batch = scored(objective, layout, random_tokens(objective, layout, rng))
    (mine,), (plain,) = mixture(batch).terms, objective(batch).terms
    assert torch.equal(mine.values, plain.values) and mine.weight == 1.0
    assert torch.equal(mixture.rewards(batch), objective.rewards(batch))


def test_a_copy_is_equal():
    objective = default("mpo")
    assert copy.deepcopy(objective).formula == objective.formula


def test_mpo_is_what_its_file_says():
    objective, info = default("mpo"), algo_info("mpo")
    assert [(p.name, type(p.objective), p.weight) for p in objective.mixed] == [("dpo", DPO, 0.8), ("bco", BCO, 0.4), ("sft", SFT, 1.0)]
    assert (info.view, info.coupling, info.slug) == ("pairs", "global", "mpo") and info.needs_reference
    assert list(info.formula) == ["dpo_preference", "bco_preference", "sft_nll"] and info.formula["sft_nll"] == "1.0 * (-y/n)"


def test_a_run_logs_each_part(tmp_path, tiny_lm):
    parts = "algo.parts=[{algo: dpo, weight: 0.5}, {algo: bco, weight: 0.5, beta: 0.2}, {algo: sft, weight: 0.1}]"
    assert train(tmp_path / "run", "algo=mpo", parts) == 0
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[f"loss/{n}"] for n in ("dpo_preference", "bco_preference", "sft_nll")), rel=1e-6)
        assert "bco_delta" in row and "reward/margin" in row
    assert rows[0]["loss/dpo_preference"] == pytest.approx(0.5 * 0.693147, abs=1e-4)
    judged = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "eval"]
    assert all(isinstance(r["loss"], float) for r in judged)


@pytest.mark.parametrize(("parts", "said"), [
    ("[]", "algo.parts has no parts; it is a list of algorithms with weights"),
    ("[dpo]", "part 1 of algo.parts is dpo; each part is an algorithm with its weight"),
    ("[{algo: dp}]", "part 1 of algo.parts: algo=dp does not exist; did you mean 'dpo'?"),
    ("[{algo: dpo}, {algo: sft, weight: much}]", "part 2 of algo.parts: weight=much: it must be a finite number"),
    ("[{algo: dpo, beta: 0}]", "part 1 of algo.parts: algo.beta=0: DPO needs beta > 0"),
    ("[{algo: dpo, bta: 0.1}]", "part 1 of algo.parts: algo.bta is no setting of DPO; did you mean 'algo.beta'?"),
    ("[{algo: dpo}, {algo: kto}]", "algo.parts: kto needs mismatched replies beside pairs"),
    ("[{algo: dpo}, {algo: dpo_pl}]", "algo.parts: dpo_pl reads several replies per prompt, in order, and DPO pairs"),
    ("[{algo: sft}, {algo: reward_bt}]", "algo.parts: reward_bt reads reward of the policy"),
    ("[{algo: sft}, {algo: ofs_dpo}]", "algo.parts: ofs_dpo reads logp of the slow"),
    ("[{algo: mpo}]", "algo.parts: mpo is a mixture itself"),
])
def test_refused(parts, said, tmp_path, capsys):
    assert train(tmp_path / "run", "algo=mpo", f"algo.parts={parts}") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_expanding_twice_changes_nothing():
    once = expanded(MIXES["mpo"])
    assert expanded(once) == once and once[0]["label_smoothing"] == 0.0
