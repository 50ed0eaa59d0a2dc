"""Modules that an objective trains beside the policy, such as SparsePO's masks.

The module is a submodule of the policy, `owned`: so its optimiser, its checkpoints and data parallelism know it. It is no part of the model
that is saved, and frozen copies of the policy, which are made before it, have none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefopt.data.batch import MicroBatch
from prefopt.objectives.base import Objective
from prefopt.policies.logprob import wide_type

PREFIX = "owned."  # of its parameters' names


def give_module(policy: nn.Module, objective: Objective, seed: int) -> None:
    """Has the objective build its module, if it trains one; its weights follow from `seed` alone."""
    if hasattr(policy, "owned"):
        del policy.owned
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = objective.build(policy.about) if hasattr(policy, "about") else None
    if module is not None:
        like = next(policy.parameters())
        policy.owned = module.to(like.device, wide_type(like.dtype)).train(policy.training)


def consult(policy: nn.Module, micro: MicroBatch, hidden: Tensor, layers: Tensor | None) -> dict[str, Tensor]:
    """What the policy's module says of its hidden states [N, d] and of the reference's [N, L, d]; computed in fp32 (float64). To be called
    in the policy's forward."""
    wide = wide_type(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return policy.owned(micro.layout, hidden.to(wide), None if layers is None else layers.to(wide))
