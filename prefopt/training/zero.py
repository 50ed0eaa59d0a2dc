"""DeepSpeed ZeRO: each process holds a part of the optimiser's state (stage 1), and of the gradients (2), and of the weights (3).

DeepSpeed does the partitioning and the exchange. Losses, micro-batches, rates, checkpoints and reports are those of a run without it: what
it is told is in the JSON of `deepspeed_json.py`, and what it gives back are the methods of `parallel.Replicated`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from prefopt.policies.split import Hooks, alone
from prefopt.training.parallel import MOMENTS, TrainingState, copied


class Zero:
    """A policy whose training state is split over processes. See `parallel.Replicated` for what the methods mean."""

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], accelerator: Accelerator):
        deepspeed = prepared(accelerator)
        if getattr(policy, "hooks", None):  # it was split when it was loaded; from here on DeepSpeed gathers
            policy.hooks.remove()
            policy.hooks = None
        self.policy, self.accelerator = policy, accelerator
        self.stage: int = settings["zero_optimization"]["stage"]
        self.model = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)[0]
        # The one that was given: stage 3 takes the parameters out of its groups and leaves the groups and their rates.
        self.optimizer = optimizer
        self.gathered = deepspeed.zero.GatheredParameters
        self.parameters = list(policy.trainable().values())
        self.updates = 0

    def synced(self, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # Whether a step is skipped is decided by its gradient here, so a loss that is not finite must not leave a finite one.
        self.model.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        """DeepSpeed, which knows `max_norm` from its JSON, clips and takes the step at once, or skips it if a gradient is not finite: then
        the norm is NaN."""
        self.model.step()
        if self.model.optimizer.overflow:
            return torch.tensor(float("nan"), device=self.accelerator.device)
        self.updates += 1
        return torch.as_tensor(self.model.get_global_grad_norm(), device=self.accelerator.device)

    def update(self) -> None:
        """The step has been taken by `clip`."""

    def clear(self) -> None:
        """So have the gradients been cleared."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        parts, policy = self.model.optimizer.parameter_offload, self.policy
        self.model.empty_partition_cache()  # it may be gathering what comes next, or keep what it will need soon
        parts._remove_module_hooks()  # they take it that all processes run the same passes
        policy.hooks = Hooks(policy, getattr(policy, "outside", None))
        try:
            with alone(policy.hooks):
                yield
        finally:
            policy.hooks.remove()
            policy.hooks = None
            parts.forward_hooks, parts.backward_hooks = [], []
            parts.setup_zero_stage3_hooks()

    def state(self, main: bool = True) -> TrainingState | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        weights, moments = {}, {}
        if self.updates:
            self._link()
        for name, parameter in self.policy.trainable().items():
            with self._one(parameter):
                if main:
                    weights[name] = copied(parameter)
            for moment in MOMENTS if self.updates else ():
                value = safe_get_full_optimizer_state(parameter, moment)  # all processes take part, tensor by tensor
                if main:
                    moments[f"{name}.{moment}"] = copied(value.view(parameter.ds_shape if self.stage == 3 else parameter.shape))
        return TrainingState(weights, moments, self.updates) if main else None

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.updates = state.updates
        self._make_moments()
        self._link()
        device = self.accelerator.device
        for name, parameter in self.policy.trainable().items():
            weight = state.weights[name].to(device)
            with self._one(parameter, writer=0):
                parameter.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)  # beside it, what the optimiser works on
            for moment in MOMENTS:
                known = state.moments.get(f"{name}.{moment}")
                safe_set_full_optimizer_state(parameter, (torch.zeros_like(weight) if known is None else known).to(device), moment)

    def _make_moments(self) -> None:
        """AdamW's state as the first step would make it, and as it stands after `updates` steps."""
        inner = self.model.optimizer
        for part in inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups:
            self.optimizer.state[part] = {"step": torch.tensor(float(self.updates), device=part.device),
                                          **{moment: torch.zeros_like(part) for moment in MOMENTS}}

    def _link(self) -> None:
        """Lets stages 1 and 2 find a parameter's moments. They look once, after the first group's step, where later groups have none."""
        if self.stage < 3:
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def _one(self, parameter: nn.Parameter, writer: int | None = None) -> AbstractContextManager:
        return self.gathered([parameter], modifier_rank=writer) if self.stage == 3 else nullcontext()


def prepared(accelerator: Accelerator) -> Any:
    """The module deepspeed, its process group there, its chatter off."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning)  # it uses older names
    if accelerator.device.type == "cpu":
        # Its own shared-memory transport needs a compiler and a minute; gloo's does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = {"cuda": "nccl"}.get(accelerator.device.type, "gloo")
    if not dist.is_initialized():  # one process, which keeps its state in CPU memory, say
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
    return deepspeed
