"""What changes between two optimiser steps: the policy goes on beyond a round, the reference and moving averages follow the policy."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.schema import TrainConfig
from prefopt.objectives.base import Objective
from prefopt.policies.arithmetic import Extrapolation
from prefopt.policies.reference import AdapterOff, FrozenCopy, make_reference
from prefopt.training.engine import Engine
from prefopt.training.online import OnlineSource
from prefopt.training.source import OfflineSource

PAST = 7  # states that a reference may go back to (SePPO, arXiv 2410.05255)


def moving_averages(objective: Objective, policy: nn.Module) -> dict[str, AdapterOff | FrozenCopy]:
    """Copies of the policy that the objective asks for as moving averages, by scorer. Call it before the first step and before an engine
    is made of the policy."""
    return {name: make_reference(policy, "initial", moves=True, name=name) for name in objective.averages()}


class WeightAverage:
    """A moving average of the trained weights, as DDPM samples from one (arXiv 2006.11239): average <- d average + (1 - d) weights after
    each optimiser step n (from 1), with d = min(decay, (1 + n) / (10 + n)), so that a short run does not stay where it began."""

    def __init__(self, policy: nn.Module, decay: float):
        self.policy, self.decay = policy, decay
        self.weights = {name: p.detach().clone() for name, p in policy.trainable().items()}

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.policy.trainable().items():
            self.weights[name].lerp_(parameter, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        return self.weights

    def load(self, state: dict[str, Tensor]) -> None:
        for name, held in self.weights.items():
            held.copy_(state[name])

    @torch.no_grad()
    def take(self) -> None:
        """Puts the average in the place of the weights."""
        for name, parameter in self.policy.trainable().items():
            parameter.copy_(self.weights[name])

    @contextmanager
    def active(self) -> Iterator[None]:
        """In it, the policy is the average; then its own weights are back, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.policy.trainable().items()}  # a copy: what is only detached would change, too
        self.take()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.policy.trainable().items():
                    parameter.copy_(own[name])


class Past:
    """Earlier states of the reference's weights, one of which it becomes: where the run began, and the last of those that were kept."""

    def __init__(self, reference: Any, seed: int | str):
        self.reference, self.seed = reference, seed
        self.states = [_copied(reference.state())]

    def keep(self) -> None:
        """Adds the policy as it stands."""
        self.reference.refresh(1.0)
        self.states = [self.states[0], *self.states[1:][-(PAST - 2) :], _copied(self.reference.state())]

    def choose(self, step: int) -> None:
        """Moves the reference to one of them, drawn from (seed, step)."""
        self.reference.load(random.Random(f"past {self.seed} {step}").choice(self.states))

    def state(self) -> dict[str, Tensor]:
        return {f"{number} {name}": tensor for number, state in enumerate(self.states) for name, tensor in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        found: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            number, _, name = key.partition(" ")
            found.setdefault(int(number), {})[name] = tensor
        self.states = [found[number] for number in sorted(found)]


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


class Moving:
    """Called before every optimiser step, at which it does what is due. Make it before the first step and before a checkpoint is loaded,
    where the policy still stands where it starts; what it keeps goes into the checkpoints (`Engine.beside`).

    In this order: at a new round the policy is extrapolated (`source.extrapolate`), which changes who writes the round; the reference
    takes `reference.mix` of the policy over, as `reference.refresh` says, or becomes one of its past states; averages that the objective
    asks for follow after each step.
    A checkpoint of step n holds what was there before this was called for step n, and a run that goes on from it begins with that call.
    """

    def __init__(self, engine: Engine, source: OfflineSource | OnlineSource, cfg: TrainConfig, averages: Mapping[str, Any]):
        self.engine, self.source, self.cfg = engine, source, cfg.reference
        engine.beside |= averages
        if cfg.source.extrapolate:
            engine.beside["extrapolation"] = Extrapolation(engine.policy.trainable(), cfg.source.extrapolate)
        if cfg.reference.refresh == "past":
            engine.beside["past"] = Past(engine.reference, cfg.seed)
        if cfg.train.ema is not None:
            engine.beside["ema"] = WeightAverage(engine.policy, cfg.train.ema)

    def __call__(self, step: int) -> None:
        """Before optimiser step `step` (from 0), on every process."""
        beside = self.engine.beside
        if step == 0 or not beside:
            return
        if "extrapolation" in beside and self.source.begins(step):
            beside["extrapolation"].jump()
        if "past" in beside:
            if step % self.cfg.every == 0:
                beside["past"].keep()
            if self._due(step):
                beside["past"].choose(step)
        elif self._due(step):
            beside["reference"].refresh(self.cfg.mix)
        for name, mix in self.engine.objective.averages().items():
            beside[name].refresh(mix)

    def after(self, step: int) -> None:
        """After optimiser step `step` (from 1), before anything is evaluated or kept of it."""
        if "ema" in self.engine.beside:
            self.engine.beside["ema"].refresh(step)

    def averaged(self) -> AbstractContextManager:
        """In it, the policy is what is evaluated, sampled and saved: the average of its weights under `train.ema`."""
        return self.engine.beside["ema"].active() if "ema" in self.engine.beside else nullcontext()

    def stands_still(self, total: int) -> str:
        """What to say of a reference that was to move, where a run of so many steps is over before it does; empty if it does move."""
        if self.cfg.refresh == "never" or any(self._due(step) for step in range(1, total)):
            return ""
        when = f"every {self.cfg.every} steps (reference.every)" if self.cfg.refresh == "steps" else f"at each {self.cfg.refresh}"
        return f"reference: it is to move {when}, and the run is over after {total} steps, before it does"

    def _due(self, step: int) -> bool:
        refresh = self.cfg.refresh
        return self.source.begins(step) if refresh in ("round", "stage", "past") else refresh == "steps" and step % self.cfg.every == 0
