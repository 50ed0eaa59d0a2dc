"""What the processes of a run do with gradients and weights between them: here every process holds all of both, and gradients are averaged
over processes (data parallelism, by accelerate). `zero.py` has the same methods for DeepSpeed ZeRO, where each process holds a part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Whole tensors in CPU memory, whichever processes hold parts of them: `weights` by name, AdamW's `moments` by `name.exp_avg` and
    `name.exp_avg_sq` (none before the first update), and how many `updates` have been made (skipped steps are none)."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0


class Replicated:
    """One process, or data parallelism: weights, gradients and moments are whole on every process."""

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator):
        self.policy, self.accelerator = policy, accelerator
        self.parameters = list(policy.trainable().values())
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        self.updates = 0

    def synced(self, last: bool) -> AbstractContextManager:
        """For forward and backward pass of a micro-batch: gradients are exchanged with the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's `loss`; what a step follows is the mean over processes."""
        self.accelerator.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """Clips the gradients to `max_norm` and returns their global norm before that."""
        return self.accelerator.clip_grad_norm_(self.parameters, max_norm)

    def update(self) -> None:
        """Takes the optimiser's step; not called where the loss or the norm is not finite."""
        self.optimizer.step()
        self.updates += 1

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def whole(self) -> AbstractContextManager:
        """In it, the policy may be called and saved by one process alone. Every process enters and leaves it, and does nothing inside that
        the others have to take part in."""
        return nullcontext()

    def state(self, main: bool = True) -> TrainingState | None:
        """A copy of what training has come to, for the main process; None for the others. Every process calls it."""
        if not main:
            return None
        held = self._states()
        moments = {f"{name}.{moment}": copied(held[parameter][moment])
                   for name, parameter in self.policy.trainable().items() if parameter in held for moment in MOMENTS}
        return TrainingState({name: copied(parameter) for name, parameter in self.policy.trainable().items()}, moments, self.updates)

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        """Takes over what `state` made. Every process calls it with the same tensors."""
        held = self._states()
        held.clear()
        for name, parameter in self.policy.trainable().items():
            parameter.copy_(state.weights[name])
            if f"{name}.{MOMENTS[0]}" in state.moments:
                held[parameter] = {
                    "step": torch.tensor(float(state.updates)),
                    **{moment: state.moments[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in MOMENTS},
                }
        self.updates = state.updates

    def _states(self) -> Mapping[Tensor, dict[str, Tensor]]:
        return getattr(self.optimizer, "optimizer", self.optimizer).state


def copied(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value
