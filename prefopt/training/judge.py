"""Judging a policy on held-out data: loss and accuracy on pairs; true reward, win rate, KL and length on samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from prefopt.config.schema import SamplerConfig
from prefopt.data.batch import Row
from prefopt.data.records import Example
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import reduce_terms, total_weights
from prefopt.policies.reference import Provider
from prefopt.rewards.true_reward import RewardFunction
from prefopt.training.coupling import gather_batches, join
from prefopt.training.engine import Engine, quantities
from prefopt.training.metrics import Averages, pair_metrics
from prefopt.training.source import OfflineSource

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass
class Judge:
    """Everything an evaluation needs. `initial` scores tokens under the policy the run started from (None: KL is not measured)."""

    engine: Engine
    held_out: OfflineSource | None
    prompts: list[Example]
    sampler: SamplerConfig
    seed: int
    reward: RewardFunction | None
    initial: Provider | None
    baseline: dict[int, float] | None = None  # reward of the initial policy's sample for each prompt

    def __call__(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(metrics row, sample rows) of the policy as it stands."""
        row: dict[str, Any] = {}
        policy = self.engine.policy
        was_training = policy.training
        policy.eval()
        try:
            with torch.no_grad():
                if self.held_out is not None and self.held_out.rows:
                    row |= self._pairs()
                samples = self._sample(step) if self.prompts else []
        finally:
            policy.train(was_training)
        if samples:
            row |= self._describe(samples)
        return row, samples

    def _pairs(self) -> dict[str, float]:
        """Loss in the objective's own view, and pair metrics wherever the rows are pairs."""
        source, engine = self.held_out, self.engine
        micros = [m.to(engine.accelerator.device) for m in source.everything(source.view)]
        everyone = gather_batches(join([engine.score(m, engine.policy) for m in micros]), engine.world)
        whole = join(everyone)
        loss, _ = reduce_terms(whole, engine.objective(whole), total_weights(engine.objective, whole))
        row = {"loss": float(loss)}
        if all(r.kind in ("pair", "ranking", "ranking_all") for r in source.rows):
            averages = Averages()
            if source.view == "pairs":
                pair_metrics(engine.objective, whole, averages)
                row |= averages.reduce(lambda x: x)
            else:
                for micro in source.everything("pairs"):
                    if micro.rows:
                        pair_metrics(engine.objective, engine.score(micro.to(engine.accelerator.device), engine.policy), averages)
                row |= averages.reduce(engine.sum_over_ranks)
        return row

    def _sample(self, step: int) -> list[dict[str, Any]]:
        """One reply per held-out prompt, with reward and log-ratio to the initial policy; the same seed at every step."""
        engine, policy = self.engine, self.engine.policy
        rank, world = engine.accelerator.process_index, engine.world
        mine = list(range(rank, len(self.prompts), world))
        ids = [policy.prompt_ids(self.prompts[i].prompt, self.prompts[i].chat) for i in mine]
        replies = policy.generate(ids, self.sampler, self.seed * 1000 + rank) if mine else []
        log_ratios = self._log_ratios(ids, [r.ids for r in replies])
        out = []
        for i, reply, log_ratio in zip(mine, replies, log_ratios, strict=True):
            prompt = self.prompts[i].prompt_text
            out.append({
                "step": step, "id": i, "prompt": prompt, "completion": reply.text, "tokens": len(reply.ids), "finished": reply.finished,
                "reward": self.reward(prompt, reply.text) if self.reward else None, "log_ratio": log_ratio,
            })
        if world > 1:
            out = gather_object(out)
        return sorted(out, key=lambda s: s["id"])

    def _log_ratios(self, prompts: list[list[int]], replies: list[list[int]]) -> list[float | None]:
        """log pi(y|x) - log pi_0(y|x) of sampled sequences, nats: exact per sequence, so its mean estimates KL(pi || pi_0)."""
        # Temperature or nucleus sampling draws from another distribution than the one whose KL is meant.
        if self.initial is None or not prompts or self.sampler.temperature != 1 or self.sampler.top_p != 1:
            return [None] * len(prompts)
        rows = [Row(Tokens(p, [Branch(r, [True] * len(r), True)]), "demonstration") for p, r in zip(prompts, replies, strict=True)]
        budget = self.held_out.budget if self.held_out else 4096
        source = OfflineSource(rows, "demonstrations", len(rows), budget, self.engine.policy.pad, False, 0)
        ratios: list[float | None] = [None] * len(rows)
        for micro in source.everything("demonstrations"):
            micro = micro.to(self.engine.accelerator.device)
            now, start = (quantities(f(micro), micro.layout)["logp"] for f in (self.engine.policy, self.initial))
            for row, value in zip(micro.rows, (now - start).tolist(), strict=True):
                ratios[row] = value
        return ratios

    def _describe(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "length": sum(s["tokens"] for s in samples) / len(samples),
            "finished": sum(s["finished"] for s in samples) / len(samples),
        }
        if self.reward is not None:
            if self.baseline is None:
                self.baseline = {s["id"]: s["reward"] for s in samples}
            rewards = [s["reward"] for s in samples]
            wins = [0.5 * (1 + _sign(s["reward"] - self.baseline[s["id"]])) for s in samples]
            row |= interval("true_reward", rewards) | interval("win_rate", wins)
        if samples[0]["log_ratio"] is not None:
            row |= interval("kl", [s["log_ratio"] for s in samples])
        return row


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean with its 95 % interval (normal approximation) as `name`, `name_low`, `name_high`."""
    n = len(values)
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
    return {name: mean, f"{name}_low": mean - Z95 * spread, f"{name}_high": mean + Z95 * spread}


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
