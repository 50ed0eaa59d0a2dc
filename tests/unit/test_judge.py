"""Judging: every measure against a computation by hand, whatever the objective reads and however the rows are split."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefopt.config.catalogue import groups
from prefopt.config.schema import DataConfig, OptimConfig, RewardConfig, SamplerConfig
from prefopt.data.bandit import reward_table
from prefopt.data.batch import Row
from prefopt.objectives.base import reduce_terms, total_weights
from prefopt.objectives.pairwise import DPO
from prefopt.policies.tabular import Tabular
from prefopt.rewards.true_reward import make_rewards
from prefopt.training.coupling import join
from prefopt.training.engine import Engine
from prefopt.training.judge import Judge, answer, preferred
from prefopt.training.source import OfflineSource
from tests.toy import example
from tests.toy_runs import fresh_accelerator
from tests.unit.test_engine import TinyPolicy, engine_of, make_rows, objective_named, rows_for, source_of

CPU = torch.device("cpu")


def judge_of(engine, rows, budget=10**6, view=None, **settings) -> Judge:
    objective = engine.objective
    source = replace(source_of(objective, rows, budget, batch=len(rows)), view=view or objective.view)
    return Judge(engine, source, settings.get("prompts", []), SamplerConfig(), 0, settings.get("rewards", {}), None)


def offline_algorithms() -> list[str]:
    made = {slug: objective_named(slug) for slug in groups()["algo"]}
    return [slug for slug, o in made.items() if o.view != "groups" and not {"reward", "step_logp"} & set(o.quantities["policy"])]


def by_hand(policy, row: Row) -> list[tuple[float, int]]:
    """(log-prob, trained tokens) of each completion of a row, one sequence at a time."""
    out = []
    for branch in row.tokens.branches:
        alone = Row(replace(row.tokens, branches=[branch]), "demonstration")
        micro = OfflineSource([alone], "demonstrations", 1, 10**6, 0, False, 0).everything("demonstrations")[0]
        with torch.no_grad():
            out.append((float(policy(micro).sum()), sum(branch.mask)))
    return out


# ---- held-out rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", offline_algorithms())
def test_loss_and_accuracies_are_those_of_every_row_taken_alone(slug):
    """However the rows are cut into micro-batches."""
    objective = objective_named(slug)
    with fresh_accelerator() as accelerator:
        engine = engine_of(objective, accelerator)
        rows = rows_for(objective, 12)
        rows[3].label = 0.2  # the second reply is the better one
        rows[5].tokens.prompt = rows[3].tokens.prompt  # two rows of one prompt
        judged = [judge_of(engine, rows, budget).measure(0) for budget in (10**6, 20)]
        whole = source_of(objective, rows, 10**6, batch=12).everything(objective.view)[0]
        with torch.no_grad():
            batch = engine.score(whole)
            loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, whole.layout))
    ours, theirs = ([by_hand(policy, r) for r in rows] for policy in (engine.policy, TinyPolicy(1)))
    sides, told = ([(t[1], t[0]) if r.label < 0.5 else (t[0], t[1]) for t, r in zip(table, rows, strict=True)] for table in (ours, theirs))
    prompts = {tuple(r.tokens.prompt) for r in rows}
    for found in judged:
        row = found.row()
        assert row["loss"] == pytest.approx(float(loss), rel=1e-9)
        assert row["logp/chosen"] == pytest.approx(np.mean([w[0] for w, _ in sides]))
        assert row["ranking_accuracy"] == pytest.approx(np.mean([w[0] > lose[0] for w, lose in sides]))
        assert row["ranking_accuracy_per_token"] == pytest.approx(np.mean([w[0] / w[1] > lose[0] / lose[1] for w, lose in sides]))
        assert row["reference_ranking_accuracy"] == pytest.approx(np.mean([w[0] > lose[0] for w, lose in told]))
        if slug == "dpo":
            margins = [objective.beta * ((w[0] - rw[0]) - (lose[0] - rl[0])) for (w, lose), (rw, rl) in zip(sides, told, strict=True)]
            assert row["reward/margin"] == pytest.approx(np.mean(margins))
            assert row["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))
        assert len(prompts) < 12 and {len(v) for v in found.pairs.values()} == {len(prompts)}, "one value per prompt"
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1


@pytest.mark.parametrize("slug", ["dpo", "tpo_tree", "kto"])
def test_only_what_a_coupled_loss_needs_is_joined(slug, monkeypatch):
    """Of others each micro-batch is read by itself: hidden states of all rows at once would be many gigabytes."""
    joined = []
    monkeypatch.setattr("prefopt.training.judge.join", lambda batches: joined.append(1) or join(batches))
    objective = objective_named(slug)
    with fresh_accelerator() as accelerator:
        judge_of(engine_of(objective, accelerator), rows_for(objective, 8), 20).measure(0)
    assert bool(joined) == (objective.coupling == "global") == (slug == "kto")


def test_the_reference_is_judged_once_and_a_label_of_one_half_prefers_nobody():
    with fresh_accelerator() as accelerator:
        judge = judge_of(engine_of(DPO(), accelerator), rows := make_rows(6))
        rows[0].label = 0.5
        for i, row in enumerate(rows):
            row.tokens.prompt = [i, i]
        first, second = judge(0)[0], judge(1)[0]
        assert preferred(rows[0]) == [] and len(judge.measure(2).pairs["accuracy"]) == 5
    assert "reference_ranking_accuracy" in first and "reference_ranking_accuracy" not in second
    ends = {k for k in first if k.endswith("_low")}
    assert ends == {"accuracy_low", "ranking_accuracy_low"}, "the metrics of a run carry the intervals that its report shows"


@pytest.mark.parametrize("kind", ["unary", "demonstration"])
def test_rows_without_preferences_give_a_loss_and_no_accuracy(kind):
    slug = {"unary": "kto", "demonstration": "sft"}[kind]
    objective = objective_named(slug)
    with fresh_accelerator() as accelerator:
        engine, rows = engine_of(objective, accelerator), rows_for(objective, 6)
        for row in rows:
            row.kind, row.desirable = kind, [True, False] if kind == "unary" else None
        found = judge_of(engine, rows).measure(0).row(())
    ours, theirs = ([by_hand(policy, r) for r in rows] for policy in (engine.policy, TinyPolicy(1)))
    sides = {"log_ratio/chosen": 0, "log_ratio/rejected": 1} if kind == "unary" else {"log_ratio/chosen": 0}
    assert set(found) == {"loss", *sides}
    for name, side in sides.items():
        assert found[name] == pytest.approx(np.mean([o[side][0] - t[side][0] for o, t in zip(ours, theirs, strict=True)]))


def test_rankings_have_kendalls_tau_and_count_every_pair_that_differs():
    rows = make_rows(8)
    for i, row in enumerate(rows):
        row.tokens.branches = [b for r in make_rows(2, seed=i + 1) for b in r.tokens.branches]
        row.kind, row.label, row.mismatched, row.scores = "ranking_all", 1.0, None, [3.0, 2.0, 2.0, 0.0]
    with fresh_accelerator() as accelerator:
        engine = engine_of(DPO(), accelerator)
        found = judge_of(engine, rows).measure(0).row()
    taus, hits = [], []
    for row in rows:
        logps = [logp for logp, _ in by_hand(engine.policy, row)]
        ordered = [(i, j) for i, j in combinations(range(4), 2) if row.scores[i] != row.scores[j]]
        signs = [math.copysign(1, logps[i] - logps[j]) for i, j in ordered]
        taus.append(sum(signs) / 5)
        hits += [s > 0 for s in signs]
    assert found["ranking_kendall_tau"] == pytest.approx(np.mean(taus)) and found["ranking_accuracy"] == pytest.approx(np.mean(hits))
    assert -1 <= found["kendall_tau"] <= 1 and "kendall_tau_low" in found


class RewardHead(TinyPolicy):
    """A reward model: one number per edge, and nothing to sample from."""

    quantity = "reward"

    def forward(self, micro):
        return (self.embed[micro.input_ids].sum(-1) * micro.attention).sum(1)


def test_a_reward_model_is_judged_on_pairs_alone():
    rows = [replace(row, label=1.0, mismatched=None) for row in make_rows(10)]
    with fresh_accelerator() as accelerator:
        model = RewardHead()
        engine = Engine(model, objective_named("reward_bt"), None, OptimConfig(), accelerator)
        row, samples = judge_of(engine, rows, prompts=[example(prompt="0")], rewards={"true_reward": lambda e: [0.0]})(0)
    totals = [[float(model.embed[r.tokens.prompt + b.ids].detach().sum()) for b in r.tokens.branches] for r in rows]
    assert row["accuracy"] == pytest.approx(np.mean([c > r for c, r in totals]))
    assert not samples and not any(k.startswith(("ranking", "logp", "reference", "kl", "win")) for k in row)


# ---- samples -------------------------------------------------------------------------------------


def bandit_judge(accelerator, rewards=None, prompts=4, **settings) -> Judge:
    policy = Tabular(CPU)
    engine = Engine(policy, DPO(), lambda m: start(m), OptimConfig(), accelerator)
    start = Tabular(CPU).requires_grad_(False)
    known = make_rewards(RewardConfig(), DataConfig(name="bandit", source="bandit"))
    return Judge(engine, None, [example(prompt=str(i % 4)) for i in range(prompts)], SamplerConfig(**settings), 0,
                 known if rewards is None else rewards, start)


def test_samples_are_measured_against_the_first_ones():
    with fresh_accelerator() as accelerator:
        judge = bandit_judge(accelerator, prompts=40)
        before, first = judge(0)
        with torch.no_grad():
            best = torch.tensor(reward_table()).argmax(1)
            judge.engine.policy.logits[torch.arange(4), best] += 50.0
        after, second = judge(7)
    assert before["win_rate"] == before["lc_win_rate"] == 0.5 and before["kl"] == 0 and before["length"] == 1
    assert after["true_reward"] == pytest.approx(np.mean([max(r) for r in reward_table()]), abs=1e-6)
    wins = [0.5 * (1 + np.sign(b["reward"] - a["reward"])) for a, b in zip(first, second, strict=True)]
    assert after["win_rate"] == pytest.approx(np.mean(wins)) and after["win_rate_low"] < after["win_rate"] < after["win_rate_high"] <= 1
    expected = [-float(Tabular(CPU).logits.detach().log_softmax(-1)[i, best[i]]) for i in range(4)]
    assert after["kl"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert {"step", "id", "prompt", "completion", "tokens", "finished", "reward", "log_ratio"} == set(second[0])


def test_samples_do_not_depend_on_the_number_of_processes():
    with fresh_accelerator() as accelerator:
        judge = bandit_judge(accelerator, prompts=11)
        one = judge._sample(0)
        shared = []
        for rank in range(3):
            judge.engine.accelerator = SimpleNamespace(process_index=rank, num_processes=3, device=CPU)
            shared += judge._sample(0)
    assert sorted(shared, key=lambda s: s["id"]) == one and len({s["completion"] for s in one}) > 4


def test_the_known_reward_decides_beside_a_learned_one():
    asked = []

    def learned(examples):
        asked.append([(e.prompt_text, e.completions[0].text) for e in examples])
        return [-10.0 - i for i in range(len(examples))]

    known = make_rewards(RewardConfig(), DataConfig(name="bandit", source="bandit"))
    with fresh_accelerator() as accelerator:
        judge = bandit_judge(accelerator, {"reward": learned, **known})
        row, samples = judge(0)
    assert judge.main_reward == "true_reward" and row["reward"] == -11.5 and row["true_reward"] == pytest.approx(
        np.mean([s["reward"] for s in samples]))
    assert asked == [[(s["prompt"], s["completion"]) for s in samples]], "one call with all replies"
    assert [s["rewards"]["reward"] for s in samples] == [-10, -11, -12, -13]
    with fresh_accelerator() as accelerator:
        row, samples = bandit_judge(accelerator, {"reward": learned})(0)
    assert row["reward"] == samples[0]["reward"] - 1.5 and "true_reward" not in row and row["win_rate"] == 0.5


def test_without_a_reward_what_needs_no_judge_is_measured():
    with fresh_accelerator() as accelerator:
        row, samples = bandit_judge(accelerator, {})(0)
        warm, _ = bandit_judge(accelerator, {}, temperature=0.5)(0)
    assert set(row) >= {"length", "finished", "kl"} and "win_rate" not in row and samples[0]["reward"] is None
    assert "kl" not in warm


def test_rewards_of_a_world_are_those_of_its_replies():
    (name, reward), *_ = make_rewards(RewardConfig(), DataConfig(name="bandit", source="bandit")).items()
    asked = [answer(example(prompt="1"), "1:2"), answer(example(prompt="0"), "3:1"), example(prompt="2", completion="2:0", label=True)]
    assert name == "true_reward" and reward(asked) == [reward_table()[1][2], -2.0, reward_table()[2][0]] and reward([]) == []
    assert make_rewards(RewardConfig("none"), DataConfig(name="bandit", source="bandit")) == {}
    assert make_rewards(RewardConfig(), DataConfig(name="mine", source="files")) == {}
