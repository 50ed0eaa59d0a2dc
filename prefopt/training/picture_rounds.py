"""Rounds of pictures: the policy draws for captions, a reward or the policy itself judges, and the objective learns from what was drawn.

A sample's latents are those that the sampler ended with: nothing is encoded again. Where each sample starts follows from (seed, round, row,
place in the round), so that a round does not depend on how it is split over processes or batches.
"""

from __future__ import annotations

import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.config.schema import SourceConfig
from prefopt.data.batch import Row, step_rows
from prefopt.data.dataset import Dataset
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.policies.noise import address
from prefopt.policies.reference import Provider
from prefopt.policies.sites import Way
from prefopt.rewards.true_reward import judged
from prefopt.training.checkpoint import naming
from prefopt.training.engine import quantities
from prefopt.training.judge import answer
from prefopt.training.online import OnlineSource, Sample

DRAWS = 10  # of time and noise that a policy judges a picture at (SAIL, arXiv 2602.05380); a prompt's pictures share them


@dataclass
class Picture(Sample):
    """A sample whose one id is the address of a picture; `partner` is the reward of the picture that its row holds, where that was asked.
    `latent` and `way` (how it was drawn) are kept as tensors beside the round's rows."""

    partner: float | None = None
    latent: Tensor | None = None
    way: Way | None = None


class PictureRounds(OnlineSource):
    """Rounds of a diffusion model. `given`: the rows as the data has them, in the order of the prompts, where a round asks for them.
    `start` scores pictures under the policy that the run started from, for `source.judge=policy`."""

    kind: ClassVar = Picture

    def __init__(self, *args: Any, given: Dataset | None = None, start: Provider | None = None):
        super().__init__(*args)
        self.given, self.start = given, start
        self.known: list[int] = []  # addresses of the pictures of the round
        self.worth: dict[int, float] = {}  # row -> the reward of its own picture
        if self.cfg.guidance is not None:
            self.sampler = replace(self.sampler, guidance=self.cfg.guidance)

    # ---- drawing ---------------------------------------------------------------------------------

    def _own(self, number: int) -> int:
        """How many prompts of a round are drawn for; in the first, a policy that is yet to learn can judge nothing."""
        if self.cfg.mix < 1 and self.cfg.judge == "policy" and number == 0:
            return 0
        return round(self.cfg.mix * self.cfg.prompts)

    def _drawn(self, number: int, count: int) -> list[int]:
        return super()._drawn(number, count)[: self._own(number)]

    def _begin(self, number: int) -> list[Sample]:
        samples = super()._begin(number)
        if number == 0 and samples and self._asks and len({s.reward for s in samples}) == 1 and len(samples) > 2:
            raise UserError(f"the reward of all {len(samples)} pictures of the first round is {samples[0].reward:g}; a constant tells none "
                            "from another. Choose another reward, or raise source.samples")
        return samples

    @property
    def _chunk(self) -> int:
        """Whole prompts: the samples of one are judged together."""
        return max(self.sampler.batch_size // self.cfg.samples, 1) * self.cfg.samples

    @property
    def _asks(self) -> bool:
        return self.cfg.labels != "given" and self.cfg.judge == "reward"

    def _model(self) -> AbstractContextManager:
        """In it, the model that it gives draws as the writer does."""
        return nullcontext(self.engine.policy) if self.cfg.writer == "policy" else self.engine.reference.model()

    def _sample(self, asked: list[int], number: int, start: int) -> list[Sample]:
        prompts = [self.prompts.rows[p].tokens.prompt for p in asked]
        keys = [("round", self.seed, number, p, start + k) for k, p in enumerate(asked)]
        ways: list[Way] | None = [] if self.engine.policy.draws.cfg.plan == "states" else None
        with self._model() as model:
            latents = model.draw(prompts, keys, self.sampler, ways)
        rewards = [0.0] * len(asked)
        if self._asks:
            images = self.engine.policy.encoders().decode(latents)
            rewards = judged(self.reward, [answer(self.prompts.examples[p], "", i) for p, i in zip(asked, images, strict=True)])
        samples = [Picture(p, [address(*key)], True, "", reward, latent=latent)
                   for p, key, reward, latent in zip(asked, keys, rewards, latents, strict=True)]
        for sample, way in zip(samples, ways or (), strict=False):
            sample.way = replace(way, picture=sample.ids[0])
        if self._asks and self.cfg.partner == "given":
            self._judge_given(set(asked))
            for sample in samples:
                sample.partner = self.worth[sample.prompt]
        self._know(samples)
        if self.cfg.judge == "policy":
            for sample, reward in zip(samples, self._implicit(samples), strict=True):
                sample.reward = reward
        return samples

    def _judge_given(self, rows: set[int]) -> None:
        """Has the reward of the picture that a row holds known, for those of `rows` where it is not."""
        new = sorted(rows - self.worth.keys())
        examples = [self.given.examples[row] for row in new]
        alone = [replace(e, completions=[e.completions[_chosen(self.given.rows[row])]]) for row, e in zip(new, examples, strict=True)]
        self.worth |= zip(new, judged(self.reward, alone), strict=True)

    @torch.no_grad()
    def _implicit(self, samples: list[Sample]) -> list[float]:
        """beta (log pi - log pi_0) of each picture, the reward that DPO's policy stands for, pi_0 where the run started; a prompt's
        pictures at the same draws."""
        engine, policy, size = self.engine, self.engine.policy, self.cfg.samples
        rows = [Row(Tokens(self.prompts.rows[group[0].prompt].tokens.prompt, self._branches(group, list(range(DRAWS)))), "ranking_all",
                    scores=[0.0] * len(group)) for group in (samples[i : i + size] for i in range(0, len(samples), size))]
        source = replace(self.batches, rows=rows, view="ranking", rank=0, world=1)
        found: dict[int, list[float]] = {}
        was_training = policy.training
        policy.eval()
        try:
            for micro in source.everything("ranking"):
                micro = micro.to(engine.accelerator.device)
                now, then = (quantities(scorer(micro), micro.layout)["logp"] for scorer in (policy, self.start))
                values = (engine.objective.beta * (now - then)).tolist()
                for row in micro.rows:
                    count = len(rows[row].tokens.branches)
                    found[row], values = values[:count], values[count:]
        finally:
            policy.train(was_training)
        return [value for row in range(len(rows)) for value in found[row]]

    # ---- what is kept of a round -----------------------------------------------------------------

    def _know(self, samples: list[Sample]) -> None:
        """Has the policy find the latents of samples under their addresses."""
        for sample in samples:
            self.engine.policy.encodings.add_latent(sample.ids[0], sample.latent)

    def _write(self, number: int, samples: list[Sample]) -> None:
        """Latents first: a round whose rows are there is whole. Where a round is one step, nobody comes back to its latents."""
        if self.steps_per_round > 1 and samples:
            parts = {"latent": [s.latent for s in samples]}
            if samples[0].way:
                parts |= {name: [getattr(s.way, name) for s in samples] for name in ("times", "states", "said")}
            file = self._path(number).with_suffix(".safetensors")
            with naming(file):
                save_file({name: torch.stack(tensors).contiguous() for name, tensors in parts.items()}, file)
        super()._write(number, [replace(s, latent=None, way=None) for s in samples])

    def _read(self, number: int) -> list[Sample]:
        samples, file = super()._read(number), self._path(number).with_suffix(".safetensors")
        if not samples:
            return []
        if not file.is_file():
            raise UserError(f"{file} is missing, and the run stopped in the middle of that round; put it back, or start anew with "
                            "resume=never in another folder")
        held = load_file(file)
        ways = [Way(s.ids[0], *(held[name][k] for name in ("times", "states", "said"))) if "said" in held else None
                for k, s in enumerate(samples)]
        return [replace(s, latent=held["latent"][k], way=ways[k]) for k, s in enumerate(samples)]

    def _measures(self, samples: list[Sample]) -> dict[str, float]:
        if not samples or self.cfg.labels == "given":
            return {}
        found = self._rewards(samples)
        if self.cfg.partner == "given":
            found = {"rollout/reward": found["rollout/reward"], "rollout/partner": fmean(s.partner for s in samples)}
        return found

    def _total(self, number: int, samples: list[Sample]) -> int:
        return self.cfg.samples * sum(self._own(n) for n in range(number + 1))

    # ---- rows ------------------------------------------------------------------------------------

    def _rows(self, samples: list[Sample], number: int) -> list[Row]:
        policy, now = self.engine.policy, [s.ids[0] for s in samples]
        policy.encodings.forget(set(self.known) - set(now))
        policy.ways.clear()
        self.known = now
        self._know(samples)
        if self.cfg.top < 1:
            samples = self._top(samples)
        rows = super()._rows(samples, number)
        if self.cfg.mix < 1:
            count, total = self.cfg.prompts - self._own(number), len(self.given.rows)
            first = sum(self.cfg.prompts - self._own(n) for n in range(number))
            rows += [self.given.rows[step_rows(total, total, i // total, f"{self.seed} given")[i % total]]
                     for i in range(first, first + count)]
        return rows

    def _top(self, samples: list[Sample]) -> list[Sample]:
        """The samples of those prompts whose best has one of the highest rewards of the round."""
        size = self.cfg.samples
        groups = sorted((samples[i : i + size] for i in range(0, len(samples), size)), key=lambda g: -max(s.reward for s in g))
        return [s for group in groups[: max(1, round(self.cfg.top * len(groups)))] for s in group]

    def _row(self, group: list[Sample], rng: random.Random) -> Row:
        if self.batches.view == "demonstrations":
            best = max(group, key=lambda s: s.reward)
            return Row(Tokens(self.prompts.rows[best.prompt].tokens.prompt, self._branches([best])), "demonstration")
        if self.cfg.partner == "sample":
            return super()._row(group, rng)
        (sample,), draws = group, self.engine.policy.draws
        given = self.given.rows[sample.prompt]
        own, (caption,) = given.tokens.branches[_chosen(given)].ids, given.tokens.prompt
        first = second = address("group", caption, *sorted((own[0], sample.ids[0])))
        if draws.cfg.plan == "independent":  # times too
            second = address("group", caption, sample.ids[0])
        numbers = draws.numbers(held_out=False)
        if sample.way:
            self.engine.policy.ways[first] = sample.way
        branches = [draws.branch(own[0], own[1], first, numbers), draws.branch(sample.ids[0], caption, second, numbers)]
        return Row(replace(given.tokens, branches=branches, cut_completions=[0, 0]), "pair", self._label(sample, rng), given.weight)

    def _label(self, sample: Picture, rng: random.Random) -> float:
        """Probability that the picture that a row holds is better than the sample."""
        if self.cfg.labels == "given":
            return 1.0
        ahead = sample.partner - sample.reward
        if self.cfg.labels == "best":
            return 0.5 + 0.5 * ((ahead > 0) - (ahead < 0))
        likely = 1 / (1 + math.exp(-ahead))
        return likely if self.cfg.labels == "soft" else float(rng.random() < likely)

    def _branches(self, samples: list[Sample], numbers: list[int] | None = None) -> list[Branch]:
        """The pictures of a prompt are one group: they share times and noise."""
        draws, (caption,) = self.engine.policy.draws, self.prompts.rows[samples[0].prompt].tokens.prompt
        pictures = [s.ids[0] for s in samples]
        group = address("group", caption, *sorted(pictures))
        return [draws.branch(p, caption, group, draws.numbers(held_out=False) if numbers is None else numbers) for p in pictures]


def _chosen(row: Row) -> int:
    """Which of the pictures of a row of the data is the better one."""
    return 0 if row.label >= 0.5 else len(row.tokens.branches) - 1


def asks_for_given(cfg: SourceConfig) -> bool:
    """Whether rounds need the pictures that the rows of the data hold."""
    return cfg.partner == "given" or cfg.mix < 1
