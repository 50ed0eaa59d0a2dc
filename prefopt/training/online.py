"""Batches of what the policy itself wrote: sample replies to prompts, have them judged, train on them, and so on, round by round."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object

from prefopt.config.schema import SamplerConfig, SourceConfig
from prefopt.data.batch import MicroBatch, Row, derangement, step_rows
from prefopt.data.dataset import Dataset
from prefopt.data.rejection import rejection_sample
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.rewards.true_reward import RewardFunction, judged
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.engine import Engine
from prefopt.training.judge import answer
from prefopt.training.rundir import write_atomic
from prefopt.training.source import OfflineSource


@dataclass
class Sample:
    """A reply that the policy wrote in a round, and its reward. `prompt` is the row number of its prompt in the training data."""

    prompt: int
    ids: list[int]
    finished: bool
    text: str
    reward: float
    previous: list[float] | None = None  # log-prob of each token under the policy that wrote it, nats


class OnlineSource:
    """A round draws `source.prompts` prompts, samples `source.samples` replies to each, and trains on them for `source.epochs` passes.

    `pairs`, `unary` and `demonstrations` views get the best and the worst reply of each prompt (or all of them, with `data.pairs=all`),
    the `ranking` and `groups` views all replies with their rewards. With `source.keep` a prompt has only the replies that rejection
    sampling keeps of it, and its pairs are drawn from them at random. Samples follow from who writes them and (seed, round, place), not
    from the number of processes. A round is written to `rounds/` before its first step, so that a run killed in the middle of it goes on
    with it.
    """

    kind: ClassVar = Sample

    def __init__(self, engine: Engine, prompts: Dataset, reward: RewardFunction, cfg: SourceConfig, sampler: SamplerConfig,
                 pairs: str, folder: Path, batches: OfflineSource):
        self.engine, self.prompts, self.reward, self.cfg, self.sampler = engine, prompts, reward, cfg, sampler
        self.pairs, self.folder, self.batches = pairs, folder / "rounds", batches
        self.steps_per_round = cfg.epochs * math.ceil(round_rows(cfg, batches.view, pairs) / batches.batch_size)
        self.seed, self.round = batches.seed, -1
        self.metrics: dict[str, float] = {}  # of the round; `samples` counts replies since the start
        self.waited = 0.0  # seconds that the last step spent on sampling and judging its round

    def steps(self, epochs: float) -> int:
        """Optimiser steps in so many passes over the prompts."""
        return max(1, math.ceil(epochs * len(self.prompts.rows) / self.cfg.prompts)) * self.steps_per_round

    def begins(self, number: int) -> bool:
        """Whether optimiser step `number` is the first one of a round."""
        return number % self.steps_per_round == 0

    def step(self, number: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimiser step `number` (from 0). The first step of a round samples it."""
        wanted, place = divmod(number, self.steps_per_round)
        began = time.monotonic()
        if wanted != self.round:
            samples = self._read(wanted) if place else self._begin(wanted)
            rows = self._rows(samples, wanted)
            self.batches = replace(self.batches, rows=rows, seed=f"{self.seed} {wanted}")
            self.metrics = {**self._measures(samples), "samples": self._total(wanted, samples)}
            self.round = wanted
            if not place:
                self.metrics["rollout/seconds"] = time.monotonic() - began
        self.waited = time.monotonic() - began
        return self.batches.step(place)

    def _begin(self, number: int) -> list[Sample]:
        """Samples, judges and writes a round."""
        engine = self.engine
        asked = [p for p in self._drawn(number, self.cfg.prompts) for _ in range(self.cfg.samples)]
        chunks = range(0, len(asked), self._chunk)  # dealt out whole, so that samples do not depend on the number of ranks
        with engine.parallel.whole():
            mine = [(start, self._sample(asked[start : start + self._chunk], number, start))
                    for start in chunks[engine.accelerator.process_index :: engine.world]]
        everyone = sorted(gather_object(mine) if engine.world > 1 else mine, key=lambda chunk: chunk[0])
        samples = [s for _, chunk in everyone for s in chunk]
        if engine.accelerator.is_main_process:
            self.folder.mkdir(exist_ok=True)
            self._write(number, samples)
        return samples

    def _drawn(self, number: int, count: int) -> list[int]:
        """Rows whose prompts are asked in a round of `count`: all of them in a seeded order, and again in another one."""
        total = len(self.prompts.rows)
        return [step_rows(total, total, i // total, self.seed)[i % total] for i in range(number * count, (number + 1) * count)]

    @property
    def _chunk(self) -> int:
        """Samples that are drawn at once."""
        return self.sampler.batch_size

    @property
    def writer(self) -> Any:
        """Who writes: the policy, or its reference."""
        return self.engine.policy if self.cfg.writer == "policy" else self.engine.reference

    def _sample(self, asked: list[int], number: int, start: int) -> list[Sample]:
        """Replies to the prompts `asked`, which come from place `start` on in round `number`."""
        seed = random.Random(f"sample {self.seed} {number}").getrandbits(32)
        ids = [self.prompts.rows[p].tokens.prompt for p in asked]
        replies = self.writer.generate(ids, self.sampler, seed, range(start, start + len(asked)))
        rewards = judged(self.reward, [answer(self.prompts.examples[p], r.text) for p, r in zip(asked, replies, strict=True)])
        samples = [Sample(p, r.ids, r.finished, r.text, x) for p, r, x in zip(asked, replies, rewards, strict=True)]
        if "previous" in self.engine.objective.quantities and self.steps_per_round > 1:
            for sample, logps in zip(samples, self._token_logps(ids, samples), strict=True):
                sample.previous = logps
        return samples

    @torch.no_grad()
    def _token_logps(self, prompts: list[list[int]], samples: list[Sample]) -> list[list[float]]:
        """Log-prob of each token of each reply under the policy as it stands, nats."""
        policy, out = self.engine.policy, [[] for _ in samples]
        rows = [Row(Tokens(p, [_branch(s)]), "demonstration") for p, s in zip(prompts, samples, strict=True)]
        was_training = policy.training
        policy.eval()
        try:
            for micro in replace(self.batches, rows=rows, view="demonstrations", rank=0, world=1).everything("demonstrations"):
                made = policy(micro.to(self.engine.accelerator.device)).tolist()
                for row, length in zip(micro.rows, micro.layout.lengths.tolist(), strict=True):
                    out[row], made = made[:length], made[length:]
        finally:
            policy.train(was_training)
        return out

    def _rows(self, samples: list[Sample], number: int) -> list[Row]:
        """One row per prompt, or one for each pair of kept replies."""
        rng, rows = random.Random(f"labels {self.seed} {number}"), []
        for i in range(0, len(samples), self.cfg.samples):
            rows += [self._row(group, rng) for group in self._groups(samples[i : i + self.cfg.samples], rng)]
        if self.engine.objective.mismatched:
            other = derangement([tuple(row.tokens.prompt) for row in rows], number)
            for i, row in enumerate(rows):
                row.mismatched = rows[other[i]].tokens.branches
        return rows

    def _groups(self, replies: list[Sample], rng: random.Random) -> list[list[Sample]]:
        """What of the replies to a prompt becomes a row each."""
        if self.cfg.keep is None:
            return [replies]
        numbers = rejection_sample([s.reward for s in replies], self.cfg.keep, self.cfg.rejection_beta, rng)
        rng.shuffle(numbers)  # the best are kept early
        size = 2 if _in_pairs(self.cfg, self.batches.view, self.pairs) else len(numbers)
        return [[replies[j] for j in numbers[k : k + size]] for k in range(0, len(numbers), size)]

    def _row(self, group: list[Sample], rng: random.Random) -> Row:
        """The replies in the order that their rewards give them. Where there is nothing to learn from their order the row weighs 0: where
        they are the same text, or worth the same and not labelled by probabilities."""
        scores, labels = [s.reward for s in group], self.cfg.labels
        if labels == "sampled":  # Gumbel noise: the order is a draw from Plackett-Luce, Bradley-Terry for two
            scores = [x - math.log(-math.log(1 - rng.random())) for x in scores]
        if self.batches.view == "groups":
            order, kind = range(len(group)), "group"
        else:
            order, kind = sorted(range(len(group)), key=lambda j: -scores[j]), "ranking_all"
            if self.batches.view != "ranking" and (self.pairs == "best_worst" or len(group) == 2):
                order, kind = [order[0], order[-1]], "pair"
        kept = [group[j] for j in order]
        stored = {} if kept[0].previous is None else {"previous": [s.previous for s in kept]}
        row = Row(Tokens(self.prompts.rows[kept[0].prompt].tokens.prompt, self._branches(kept)), kind,
                  scores=[scores[j] for j in order], stored=stored)
        if labels == "soft":
            row.label = 1 / (1 + math.exp(row.scores[-1] - row.scores[0]))
        tied = row.scores[0] == row.scores[-1] and labels != "soft"
        if kind != "group" and (tied or all(s.ids == kept[0].ids for s in kept)):
            row.kind, row.weight = "pair", 0.0
        return row

    def _branches(self, samples: list[Sample]) -> list[Branch]:
        """What of the samples of a row is scored."""
        return [_branch(s) for s in samples]

    def _measures(self, samples: list[Sample]) -> dict[str, float]:
        """Of a round, for its steps' metrics."""
        return {**self._rewards(samples), "rollout/length": fmean(len(s.ids) for s in samples),
                "rollout/finished": fmean(s.finished for s in samples)}

    def _rewards(self, samples: list[Sample]) -> dict[str, float]:
        """Their mean, and the share of prompts whose samples are all worth the same, where these are several."""
        size = self.cfg.samples
        groups = [[s.reward for s in samples[i : i + size]] for i in range(0, len(samples), size)]
        ties = {"rollout/ties": fmean(max(g) == min(g) for g in groups)} if size > 1 else {}
        return {"rollout/reward": fmean(map(fmean, groups)), **ties}

    def _total(self, number: int, samples: list[Sample]) -> int:
        """Samples drawn up to the end of round `number`."""
        return (number + 1) * len(samples)

    def _write(self, number: int, samples: list[Sample]) -> None:
        rows = ({key: value for key, value in asdict(s).items() if value is not None} for s in samples)
        write_atomic(self._path(number), "".join(json.dumps(row) + "\n" for row in rows))

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.jsonl"

    def _read(self, number: int) -> list[Sample]:
        """A round that was begun before the run was stopped."""
        if not self._path(number).is_file():
            raise UserError(f"{self._path(number)} is missing, and the run stopped in the middle of that round; put it back, or start "
                            "anew with resume=never in another folder")
        return [self.kind(**row) for row in read_jsonl(self._path(number))]


def round_rows(cfg: SourceConfig, view: str, pairs: str) -> int:
    """How many rows a round makes for an objective with this `view`; `pairs` is data.pairs."""
    if cfg.top < 1:
        return max(1, round(cfg.top * cfg.prompts))
    return cfg.prompts * (cfg.keep // 2 if cfg.keep and _in_pairs(cfg, view, pairs) else 1)


def _in_pairs(cfg: SourceConfig, view: str, pairs: str) -> bool:
    """Whether the replies that rejection sampling keeps of a prompt make a row two by two."""
    return view in ("pairs", "unary") and pairs == "best_worst"


def _branch(sample: Sample) -> Branch:
    return Branch(sample.ids, [True] * len(sample.ids), sample.finished)
