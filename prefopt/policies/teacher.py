"""Frozen models that an objective learns from, beside its reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefopt.data.batch import MicroBatch
from prefopt.objectives.base import Objective
from prefopt.policies.asked import Asked, States, extrapolate


class Teacher:
    """One frozen model, or two of which the second, `reverse`, was taught the opposite: the teacher then is what lies beyond the first, as
    seen from the second. What is made of their distributions is for the objective to say, token by token:

    value:     `soft_value()` gives the weight and the temperature of the teacher's soft value (`policies/divergence.py`).
    distance:  sum |p - p'| of both teachers; `extrapolation(distance)` says how far beyond the first one to go [N], and at
               which temperature (`asked.extrapolate`).
    """

    def __init__(self, objective: Objective, first: nn.Module, reverse: nn.Module | None = None):
        self.objective = objective
        self.models = [m.eval().requires_grad_(False) for m in (first, reverse) if m is not None]

    @torch.no_grad()
    def __call__(self, micro: MicroBatch) -> tuple[dict[str, Tensor], States | None]:
        """(`token_logp` [N] of the first model and, as the objective wants them, `value` and `distance` [N]; the teacher's states, where
        a distribution is asked for)."""
        objective, first = self.objective, self.models[0]
        wanted = objective.quantities["teacher"]
        if wanted == ("token_logp",):
            return {"token_logp": first(micro)}, None
        away = self.models[1](micro, Asked(states=True))["states"] if "distance" in wanted else None
        asked = Asked(states=True, value=objective.soft_value() if "value" in wanted else None,
                      divergence=None if away is None else ("tv", away))
        made = first(micro, asked)
        states = made.pop("states")
        if away is not None:
            made["distance"] = made.pop("divergence")
            states = extrapolate(states, away, *objective.extrapolation(made["distance"]))
        return made, states


def live_teachers(objective: Objective, stored: bool) -> int:
    """How many frozen models beside the reference a step runs. Log-probs and values, a number per token, can be kept (`stored`);
    distributions cannot."""
    wanted = objective.quantities.get("teacher", ())
    distributions = "distance" in wanted or "teacher" in objective.states_of
    return (1 + ("distance" in wanted)) if wanted and (distributions or not stored) else 0
