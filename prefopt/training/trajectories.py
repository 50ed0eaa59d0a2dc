"""Batches of transitions: draw pictures with all steps of the sampler, have them judged, learn from the steps, round by round."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from prefopt.config.schema import TrainConfig
from prefopt.data.batch import MicroBatch, Row, step_rows
from prefopt.data.dataset import Dataset
from prefopt.data.tokenise import Tokens
from prefopt.errors import UserError
from prefopt.policies.noise import address, share
from prefopt.policies.trajectory import Sampling, Walk, draw_walks, make_sampling, transition_branch, window_of
from prefopt.rewards.true_reward import RewardFunction, judged
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.advantages import Running, group_advantages
from prefopt.training.branches import Branches
from prefopt.training.engine import Engine
from prefopt.training.judge import answer
from prefopt.training.rundir import write_atomic
from prefopt.training.source import OfflineSource


@dataclass
class Drawn:
    """What a round remembers of a picture, in its file. `prompt`: the row number of its prompt; `group`: its place among the round's
    prompts; `sample`: its number in the group."""

    prompt: int
    group: int
    sample: int
    walk: int
    reward: float


@dataclass
class Round:
    """`latents` [S, T + 1, C, h, w] and `logps` [S, T] of its pictures; with candidates the same of `pairs` in place of whole walks."""

    drawn: list[Drawn]
    latents: torch.Tensor
    logps: torch.Tensor


class TrajectorySource:
    """A round draws `source.prompts` prompts, `source.samples` pictures of each, and takes steps on `train.batch_size` prompts at a time,
    with all trained transitions of their pictures, for `source.epochs` passes.

    Of `groups`, each transition is a completion with its picture's advantage; of `pairs`, two transitions at the same step, labelled as
    their pictures are (`data.pairs`: best and worst, or all), or candidates that were compared at that step (`trajectory.candidates`).
    All noise follows from (seed, round, row, sample). Where a round has several steps its latents are written to `rounds/` before the first
    of them, so that a run killed in between goes on with the same bits; rewards of all rounds stay there.
    """

    def __init__(self, engine: Engine, prompts: Dataset, reward: RewardFunction, cfg: TrainConfig, batches: OfflineSource,
                 scorer: Any = None):
        self.engine, self.prompts, self.reward, self.cfg = engine, prompts, reward, cfg
        self.batches, self.seed, self.folder = replace(batches, draws=None), batches.seed, Path(cfg.run_dir) / "rounds"
        self.steps_per_round = cfg.source.epochs * math.ceil(cfg.source.prompts / batches.batch_size)
        self.running = Running(cfg.trajectory.buffer, cfg.trajectory.min_count)
        self.branches = Branches(cfg.trajectory, scorer, engine.objective.pull()) if cfg.trajectory.candidates else None
        self.round, self.known = -1, 0  # the round that rows are of; rounds that `running` has seen
        self.of_prompt: list[list[int]] = []  # rows of each of the round's prompts
        self.metrics: dict[str, float] = {}
        self.waited = 0.0
        engine.policy.sampling = self.sampling(0)  # what is wrong about it is said before anything is drawn

    def sampling(self, number: int) -> Sampling:
        """Of round `number`: its window is the same for all pictures."""
        policy, trajectory = self.engine.policy, self.cfg.trajectory
        window = window_of(trajectory, policy.process, lambda n: int(n * share("window", self.seed, number)))
        made = make_sampling(trajectory, policy.process, policy.cfg.guidance, window)
        return replace(made, targets=self.branches is not None and self.branches.pull is not None)

    def steps(self, epochs: float) -> int:
        """Optimiser steps in so many passes over the prompts."""
        return max(1, math.ceil(epochs * len(self.prompts.rows) / self.cfg.source.prompts)) * self.steps_per_round

    def begins(self, number: int) -> bool:
        """Whether optimiser step `number` is the first one of a round."""
        return number % self.steps_per_round == 0

    def step(self, number: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimiser step `number` (from 0). The first step of a round draws it."""
        wanted, place = divmod(number, self.steps_per_round)
        began = time.monotonic()
        if wanted != self.round:
            self._remember(wanted)
            sampling = self.engine.policy.sampling = self.sampling(wanted)
            made = self._read(wanted) if place else self._begin(wanted, sampling)
            self._set(made, wanted, sampling)
            self.round = wanted
            if not place:
                self.metrics["rollout/seconds"] = time.monotonic() - began
        self.waited = time.monotonic() - began
        chosen = step_rows(len(self.of_prompt), self.batches.batch_size, place, f"{self.seed} {wanted}")
        rows = [row for prompt in chosen for row in self.of_prompt[prompt]]
        return self.batches.micro_batches(rows or [0])  # row 0 weighs nothing: a step without pairs changes nothing

    # ---- a round ---------------------------------------------------------------------------------

    def _begin(self, number: int, sampling: Sampling) -> Round:
        """Draws, judges and writes a round."""
        engine, source = self.engine, self.cfg.source
        total, count = len(self.prompts.rows), source.prompts
        rows = [step_rows(total, total, i // total, self.seed)[i % total] for i in range(number * count, (number + 1) * count)]
        asked = [(row, group, sample) for group, row in enumerate(rows) for sample in range(source.samples)]
        size = self.cfg.sampler.batch_size
        chunks = range(0, len(asked), size)  # dealt out whole, so that pictures do not depend on the number of ranks
        with engine.parallel.whole():
            mine = [(start, self._draw(asked[start : start + size], number, sampling))
                    for start in chunks[engine.accelerator.process_index :: engine.world]]
        everyone = sorted(gather_object(mine) if engine.world > 1 else mine, key=lambda chunk: chunk[0])
        parts = [part for _, part in everyone]
        made = Round([d for p in parts for d in p.drawn], torch.cat([p.latents for p in parts]), torch.cat([p.logps for p in parts]))
        rewards = [d.reward for d in made.drawn]
        if number == 0 and max(rewards) == min(rewards):
            raise UserError(f"the reward of all {len(rewards)} pictures of the first round is {rewards[0]:g}: a constant reward says "
                            "nothing of which is better; choose another reward, or look at some pictures with prefopt sample")
        if engine.accelerator.is_main_process:
            self._write(made, number)
        return made

    def _writer(self) -> AbstractContextManager:
        """In it, the model that it gives draws: the moving average of the policy, where the objective asks for one to draw with."""
        average = self.engine.beside.get("writer")
        return average.model() if average else nullcontext(self.engine.policy)

    @torch.no_grad()
    def _draw(self, asked: list[tuple[int, int, int]], number: int, sampling: Sampling) -> Round:
        policy = self.engine.policy
        captions = [self.prompts.rows[row].tokens.prompt[0] for row, _, _ in asked]
        keys = [(self.seed, number, row, group, sample) for row, group, sample in asked]
        was_training = policy.training
        policy.eval()
        try:
            if self.branches:
                examples = [self.prompts.examples[row] for row, _, _ in asked]
                with self._writer() as writer:
                    latents, logps, pictures = self.branches.draw(writer, sampling, captions, keys, examples)
            else:
                latents, logps = draw_walks(policy, sampling, captions, keys, self.cfg.trajectory.shared_start)
                pictures = latents[:, -1]
        finally:
            policy.train(was_training)
        images = policy.encoders().decode(pictures)
        rewards = judged(self.reward, [answer(self.prompts.examples[row], "", image)
                                       for (row, _, _), image in zip(asked, images, strict=True)])
        drawn = [Drawn(*place, address("walk", *key), reward) for place, key, reward in zip(asked, keys, rewards, strict=True)]
        return Round(drawn, latents, logps)

    def _set(self, made: Round, number: int, sampling: Sampling) -> None:
        """Rows and walks of a round; row 0 weighs nothing."""
        policy, drawn = self.engine.policy, made.drawn
        rewards, size = [d.reward for d in drawn], self.cfg.source.samples
        self.rows, self.of_prompt = [], []
        if self.branches:
            policy.walks = self.branches.walks(made, sampling)
            by_prompt, kept = self.branches.rows(made, sampling, self._row)
        else:
            policy.walks = {d.walk: Walk(0, latents) for d, latents in zip(drawn, made.latents, strict=True)}
            make = self._pairs if self.batches.view == "pairs" else self._groups
            advantage = self._advantages(drawn, rewards)
            by_prompt = [make(made, range(i, i + size), sampling, advantage) for i in range(0, len(drawn), size)]
            kept = fmean(bool(own) for own in by_prompt)
        step = sampling.trained[0]
        first = (address("branch", drawn[0].walk, step, 0), step, float(made.logps[0, 0, 0])) if self.branches else \
            (drawn[0].walk, step, float(made.logps[0, step]))
        nothing = self._row(drawn[0].prompt, [first] * (2 if self.batches.view == "pairs" else 1), 0.0)
        nothing.weight = 0.0
        self.rows = [nothing]
        for own in by_prompt:
            self.of_prompt.append(list(range(len(self.rows), len(self.rows) + len(own))))
            self.rows += own
        self.batches = replace(self.batches, rows=self.rows)
        groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
        self.metrics = {
            "rollout/reward": fmean(rewards), "rollout/kept": kept, "samples": (number + 1) * len(drawn),
        }
        if size > 1:
            self.metrics["rollout/spread"] = fmean(pstdev(g) for g in groups)
        if size > 1 and not self.branches:  # which compare candidates, not pictures
            self.metrics["rollout/ties"] = fmean(max(g) == min(g) for g in groups)

    def _advantages(self, drawn: list[Drawn], rewards: list[float]) -> list[float]:
        kind = self.cfg.trajectory.advantage
        if kind == "none":
            return rewards
        if kind == "running":
            self.known += 1
            return self.running(rewards, self._prompts(drawn))
        return group_advantages(rewards, [d.group for d in drawn], kind == "global")

    def _prompts(self, drawn: list[Drawn]) -> list[tuple[int, ...]]:
        return [tuple(self.prompts.rows[d.prompt].tokens.prompt) for d in drawn]

    def _remember(self, number: int) -> None:
        """Rewards of earlier rounds, after a run was stopped."""
        while self.cfg.trajectory.advantage == "running" and self.known < number:
            drawn = [Drawn(**row) for row in read_jsonl(self._path(self.known, "jsonl"))]
            self.running([d.reward for d in drawn], self._prompts(drawn))
            self.known += 1

    def _groups(self, made: Round, places: range, sampling: Sampling, advantage: Sequence[float]) -> list[Row]:
        return [self._row(made.drawn[i].prompt, [(made.drawn[i].walk, step, float(made.logps[i, step]))], advantage[i])
                for i in places for step in sampling.trained]

    def _pairs(self, made: Round, places: range, sampling: Sampling, advantage: Sequence[float]) -> list[Row]:
        """Of a prompt's pictures the best with the worst, or every two; what is worth the same makes no pair."""
        reward = {i: made.drawn[i].reward for i in places}
        order = sorted(places, key=lambda i: -reward[i])
        couples = [(order[0], order[-1])] if self.cfg.data.pairs == "best_worst" else \
            [(a, b) for n, a in enumerate(order) for b in order[n + 1 :]]
        return [self._row(made.drawn[a].prompt, [(made.drawn[i].walk, step, float(made.logps[i, step])) for i in (a, b)], 0.0)
                for a, b in couples if reward[a] > reward[b] for step in sampling.trained]

    def _row(self, prompt: int, transitions: list[tuple[int, int, float]], advantage: float) -> Row:
        """A row of (walk, step, log-prob under the policy that drew it): one transition of a group, or the better one and the worse one."""
        ids = self.prompts.rows[prompt].tokens.prompt
        branches = [transition_branch(walk, ids[0], step) for walk, step, _ in transitions]
        stored = {"previous": [[logp] for _, _, logp in transitions]}
        return Row(Tokens(ids, branches), "pair" if self.batches.view == "pairs" else "group", scores=[advantage], stored=stored)

    # ---- its files -------------------------------------------------------------------------------

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"round-{number:06d}.{kind}"

    def _write(self, made: Round, number: int) -> None:
        """Latents are kept for the rounds that a checkpoint may lead back to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.steps_per_round > 1:
            saved = checkpoint.steps(self.folder.parent / "checkpoints")
            needed = int(saved[-2:][0].name.removeprefix("step-")) // self.steps_per_round if saved else number
            for old in self.folder.glob("round-*.safetensors"):
                if int(old.stem.removeprefix("round-")) < needed:
                    old.unlink()
            path = self._path(number, "safetensors")
            save_file({"latents": made.latents.contiguous(), "logps": made.logps.contiguous()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        write_atomic(self._path(number, "jsonl"), "".join(json.dumps(asdict(d)) + "\n" for d in made.drawn))

    def _read(self, number: int) -> Round:
        """A round that was begun before the run was stopped."""
        files = self._path(number, "jsonl"), self._path(number, "safetensors")
        if missing := next((file for file in files if not file.is_file()), None):
            raise UserError(f"{missing} is missing, and the run stopped in the middle of that round; put it back, or start anew with "
                            "resume=never in another folder")
        return Round([Drawn(**row) for row in read_jsonl(files[0])], **load_file(files[1]))
