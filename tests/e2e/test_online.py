"""Runs that learn from what their policy writes: rounds on disk, resume, labels, a reference that moves, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.data import bandit
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from prefopt.training.online import OnlineSource
from tests.toy_runs import train

BANDIT = ["model=bandit", "data=bandit", "train.batch_size=4", "source.prompts=8", "source.epochs=2"]  # four steps to a round
CASES = {
    "rollout": ["algo=grpo", *BANDIT],
    "rounds": ["algo=online_dpo", *BANDIT, "source.samples=3", "source.labels=sampled"],
    "refreshed": ["algo=online_dpo", *BANDIT, "reference.refresh=round"],
    "all pairs": ["algo=online_dpo", *BANDIT, "source.samples=4", "data.pairs=all"],
    "unary": ["algo=kto", "source=rounds", *BANDIT],
    "ranking": ["algo=dpo_pl", "source=rounds", *BANDIT, "source.samples=3"],
    "demonstrations": ["algo=sft", "source=rounds", *BANDIT],
    "lora refreshed": ["algo=online_dpo", "model=tiny-lm-lora", "source.prompts=2", "source.epochs=2", "train.batch_size=1",
                       "reference.refresh=round", "sampler.max_new_tokens=8"],
}
TEN = ["train.steps=10", "train.save_every=3", "train.eval_every=10"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.steps(folder / "checkpoints")[-1] / "weights.safetensors")


def killed_at(step: int, monkeypatch, folder: Path, *overrides: str) -> None:
    real, calls = Engine.step, []

    def stepping(self, *args):
        calls.append(1)
        if len(calls) == step:
            raise SystemError("killed")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(SystemError):
            train(folder, *overrides)


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_in_the_middle_of_a_round_resumes_to_the_same_bits(case, tmp_path, monkeypatch, tiny_lm):
    """Killed after step 6 of rounds of four steps: the second round is on disk, the policy has left the state that wrote it."""
    assert train(tmp_path / "whole", *CASES[case], *TEN) == 0
    killed_at(8, monkeypatch, tmp_path / "run", *CASES[case], *TEN)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000006"
    assert train(tmp_path / "run", *CASES[case], *TEN) == 0
    whole, run = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == run.keys() and all(torch.equal(whole[name], run[name]) for name in whole)
    rounds = [sorted((tmp_path / f / "rounds").iterdir()) for f in ("whole", "run")]
    assert len(rounds[0]) == 3 and [p.read_text() for p in rounds[0]] == [p.read_text() for p in rounds[1]]


def test_mismatched_replies_of_a_round_answer_other_prompts(tmp_path, monkeypatch):
    """With two pairs of each prompt, the next row is often one of the same prompt."""
    seen, real = [], OnlineSource._rows
    monkeypatch.setattr(OnlineSource, "_rows", lambda self, *args: seen.append(real(self, *args)) or seen[-1])
    words = ["algo=kto", "source=rounds", *BANDIT, "source.samples=8", "source.keep=4", "train.steps=8"]
    assert train(tmp_path / "run", *words, "source.prompts=3") == 0
    for rows in seen:
        assert len(rows) == 6
        for row in rows:
            (other,) = [o for o in rows if o.tokens.branches is row.mismatched]
            assert other.tokens.prompt != row.tokens.prompt


def test_a_round_that_is_gone_is_named(tmp_path, capsys, monkeypatch):
    killed_at(8, monkeypatch, tmp_path, *CASES["rollout"], *TEN)
    (tmp_path / "rounds" / "round-000001.jsonl").unlink()
    assert train(tmp_path, *CASES["rollout"], *TEN) == 2
    assert "round-000001.jsonl is missing, and the run stopped in the middle of that round" in capsys.readouterr().err


def test_metrics_of_rounds(tmp_path):
    assert train(tmp_path, "algo=grpo", *BANDIT, "train.steps=8") == 0
    rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert [r["samples"] for r in rows] == [64] * 4 + [128] * 4
    written = [json.loads(line) for line in (tmp_path / "rounds" / "round-000001.jsonl").read_text().splitlines()]
    assert rows[-1]["rollout/reward"] == pytest.approx(sum(w["reward"] for w in written) / 64)
    assert all(w["previous"] is not None for w in written)  # several steps learn from them
    # Two passes over a round: the ratio to the policy that wrote it is 1 at its first step, and no longer at the others.
    assert rows[0]["clipped"] == 0 and rows[0]["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl_to_reference"] > 0


@pytest.mark.parametrize("words", [["algo=grpo", "algo.beta=0"], ["algo=online_dpo"]], ids=["rollout", "rounds"])
def test_a_constant_reward_teaches_nothing_and_is_said_to(words, tmp_path, capsys, monkeypatch):
    """The weights stay where they were, though every step is taken."""
    monkeypatch.setattr(bandit, "reward_table", lambda: [[1.0] * bandit.REPLIES] * bandit.PROMPTS)
    assert train(tmp_path / "run", *words, *BANDIT, "train.steps=8", "train.eval_every=4") == 0
    said = capsys.readouterr().err
    assert "ALARM after step 4: The reward tells no samples apart" in said and said.count("In the last 2 rounds 100 % of") == 1
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert all(r["rollout/ties"] == 1 and r["grad_norm"] == 0 for r in rows)


def test_a_refreshed_reference_is_the_policy_at_each_round(tmp_path):
    """Every fourth step begins a round: its margin is 0 where the reference moves along, and only at the start where it stays."""
    for refresh, zeros in (("round", [0, 4, 8]), ("never", [0])):
        run = tmp_path / refresh
        assert train(run, "algo=online_dpo", *BANDIT, "train.steps=12", f"reference.refresh={refresh}") == 0
        rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "train"]
        assert [i for i, r in enumerate(rows) if abs(r["reward/margin"]) < 1e-6] == zeros


def test_kl_is_to_the_start_though_the_reference_moves(tmp_path):
    assert train(tmp_path, "algo=online_dpo", *BANDIT, "train.steps=12", "reference.refresh=round", "evaluation.prompts=60",
                 "data.eval_limit=60", "data.limit=60") == 0
    samples = [s for s in read_jsonl(tmp_path / "samples.jsonl") if s["step"] == 12]
    table = load_file(checkpoint.steps(tmp_path / "checkpoints")[-1] / "weights.safetensors")["logits"].log_softmax(-1)
    for s in samples:
        x, y = bandit.parse(s["completion"])
        assert s["log_ratio"] == pytest.approx(float(table[x, y]) - bandit.reference_table()[x][y], abs=1e-5)


def rows_of(case: list[str], folder: Path, monkeypatch) -> list:
    """The training rows made of each round of a run."""
    real, made = OnlineSource._rows, []

    def keeping(self, samples, number):
        rows = real(self, samples, number)
        made.extend((row, samples[i * self.cfg.samples : (i + 1) * self.cfg.samples]) for i, row in enumerate(rows))
        return rows

    monkeypatch.setattr(OnlineSource, "_rows", keeping)
    assert train(folder, *case) == 0
    return made


def test_the_better_reply_is_chosen_and_ties_weigh_nothing(tmp_path, monkeypatch):
    made = rows_of(["algo=online_dpo", *BANDIT, "source.samples=3", "train.steps=12"], tmp_path, monkeypatch)
    ties = 0
    for row, group in made:
        rewards = [s.reward for s in group]
        chosen, rejected = (next(s for s in group if s.ids == b.ids) for b in row.tokens.branches)
        assert chosen.reward == max(rewards) and rejected.reward == min(rewards)
        assert row.weight == (0 if max(rewards) == min(rewards) else 1)
        ties += row.weight == 0
    assert 0 < ties < len(made)


def test_sampled_labels_follow_bradley_terry(tmp_path, monkeypatch):
    made = rows_of(["algo=online_dpo", "model=bandit", "data=bandit", "source.prompts=600", "source.labels=sampled", "train.steps=4",
                    "train.batch_size=600", "optim.lr=1e-9"], tmp_path, monkeypatch)
    expected = won = variance = 0.0
    for row, group in made:
        if group[0].ids == group[1].ids:
            assert row.weight == 0
            continue
        p = 1 / (1 + math.exp(group[1].reward - group[0].reward))
        expected, variance, won = expected + p, variance + p * (1 - p), won + (row.tokens.branches[0].ids == group[0].ids)
    assert abs(won - expected) < 4 * math.sqrt(variance)
    better = sum(row.tokens.branches[0].ids == max(g, key=lambda s: s.reward).ids for row, g in made if row.weight)
    assert better < 0.9 * sum(row.weight for row, _ in made)  # the worse reply is chosen now and then


@pytest.mark.parametrize(("words", "said"), [
    ("algo=grpo source=offline", "GRPO reads several sampled replies per prompt, each with a reward; use source=rollout"),
    ("algo=dpo source=rollout", "DPO reads pairs of a chosen and a rejected reply; use source=offline or source=rounds"),
    ("algo=grpo source.samples=1", "source.samples=1: it must be at least 2"),
    ("algo=sft source=rounds source.samples=1", "source.samples=1: it must be at least 2"),
    ("algo=grpo sampler.temperature=0.7", "set sampler.temperature=1 sampler.top_p=1"),
    ("algo=grpo source.labels=sampled", "source.labels=sampled is for pairs made of rounds"),
    ("algo=grpo reward=none", "source=rollout needs a reward for what the policy writes: reward=none gives none"),
    ("algo=online_dpo data=hh-rlhf", "source=rounds needs a reward for what the policy writes: reward=auto gives none for data=hh-rlhf"),
    ("reference.refresh=round", "reference.refresh=round needs rounds, and source=offline has none"),
    ("algo=kto source=rounds source.prompts=1", "KTO needs at least two prompts per round"),
    ("algo=online_dpo source=round", "there is no source=round; did you mean 'source=rounds'?"),
])
def test_refused(words, said, tmp_path, capsys):
    assert train(tmp_path / "run", *words.split()) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.training.setup.make_rewards", lambda *_: {"true_reward": lambda examples: [math.nan] * len(examples)})
    assert train(tmp_path / "run", "algo=grpo", *BANDIT) == 2
    assert "the reward of a sample for the prompt of bandit row" in capsys.readouterr().err
