"""Who the log-ratios are taken against, and how its scores are got: stored, adapter off, a frozen copy, or loaded when needed.

Copies can move: `refresh` takes the policy's weights over, or a share of them, which makes the copy a moving average.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.schema import SamplerConfig
from prefopt.data.batch import MicroBatch
from prefopt.errors import RunFailed, UserError
from prefopt.policies.asked import Asked

# Called with a micro-batch it gives token log-probs [N]; with what is `Asked` beside, a dict that holds more.
Provider = Callable[..., Any]


class AdapterOff:
    """The policy without its adapter: costs no memory."""

    how = "adapter off"

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def active(self) -> AbstractContextManager:
        """In it, the policy scores as the reference does."""
        return self.policy.without_adapter()

    @contextmanager
    def model(self):
        """In it, the model that it gives scores as the reference does."""
        with self.active():
            yield self.policy

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, *asked: Asked) -> Any:
        was_training = self.policy.training
        self.policy.eval()
        try:
            with self.active():
                return self.policy(micro, *asked)
        finally:
            self.policy.train(was_training)

    def generate(self, prompts: list[list[int]], sampler: SamplerConfig, seed: int, places: Sequence[int] | None = None) -> list[Any]:
        """Replies of the reference, as the policy would give them."""
        with self.active():
            return self.policy.generate(prompts, sampler, seed, places)


class AsLoaded(AdapterOff):
    """The policy itself, before its first step."""

    how = "policy as loaded"

    def active(self) -> AbstractContextManager:
        return nullcontext()


class AdapterCopy(AdapterOff):
    """A second, frozen adapter beside the one that is trained."""

    how = "frozen copy of the initial adapter"

    def __init__(self, policy: nn.Module, name: str):
        super().__init__(policy)
        self.name, model = name, policy.model
        self.trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[]):  # the new adapter is drawn at random before it is overwritten
            model.add_adapter(name, model.peft_config["default"])
        self._activate("default")
        self.refresh()

    def refresh(self, mix: float = 1.0) -> None:
        """Moves it to the policy: `mix` times the policy's adapter plus (1 - mix) times its own, each matrix by itself."""
        from peft import get_peft_model_state_dict

        now, own = get_peft_model_state_dict(self.policy.model, adapter_name="default", save_embedding_layers=False), self.state()
        self.load({name: own[name].lerp(now[name].to(own[name].dtype), mix) for name in now})

    def state(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.policy.model, adapter_name=self.name, save_embedding_layers=False)

    def load(self, state: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.policy.model, state, adapter_name=self.name)

    def _activate(self, adapter: str) -> None:
        model = self.policy.model
        model.base_model.set_adapter(adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trainable)

    @contextmanager
    def active(self):
        self._activate(self.name)
        try:
            yield
        finally:
            self._activate("default")


class FrozenCopy:
    """A second model."""

    how = "frozen copy"

    def __init__(self, policy: nn.Module, frozen: nn.Module | None = None):
        if frozen is None:
            shared = {id(p): p for p in policy.parameters() if not p.requires_grad}  # what an adapter lies on is the same for both
            frozen = copy.deepcopy(policy, shared)
        self.policy, self.frozen = policy, frozen.eval().requires_grad_(False)

    def model(self) -> AbstractContextManager:
        """In it, the model that it gives scores as the reference does."""
        return nullcontext(self.frozen)

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, *asked: Asked) -> Any:
        return self.frozen(micro, *asked)

    def generate(self, prompts: list[list[int]], sampler: SamplerConfig, seed: int, places: Sequence[int] | None = None) -> list[Any]:
        """Replies of the copy, as the policy would give them."""
        return self.frozen.generate(prompts, sampler, seed, places)

    @torch.no_grad()
    def refresh(self, mix: float = 1.0) -> None:
        """Moves it to the policy: `mix` times the policy's weights plus (1 - mix) times its own."""
        now = self.policy.trainable()
        for name, parameter in self.frozen.named_parameters():
            if name in now:
                parameter.lerp_(now[name], mix)

    def state(self) -> dict[str, Tensor]:
        trained = self.policy.trainable()  # once: to find them all takes as long as to look through the copy
        return {name: p for name, p in self.frozen.named_parameters() if name in trained}

    def load(self, state: dict[str, Tensor]) -> None:
        self.frozen.load_state_dict(state, strict=False)


class Stored:
    """Scores that micro-batches bring along (`MicroBatch.stored`); there is nobody to ask for others."""

    def __init__(self, how: str):
        self.how = how

    def __call__(self, micro: MicroBatch, *asked: Asked) -> Any:
        raise RunFailed(f"rows {micro.rows} have no scores in the reference store, and are not scored anew on the way; "
                        "reference.store=off keeps a reference in memory")


class Reloaded:
    """A second model that is loaded when it is first asked and kept until `release`: for scores that are wanted now and then."""

    how = "loaded for each evaluation"

    def __init__(self, load: Callable[[], nn.Module]):
        self.load, self.model = load, None

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, *asked: Asked) -> Any:
        self.ready()
        return self.model(micro, *asked)

    def ready(self) -> None:
        """Loads it, if it is not there: under ZeRO stage 3 all processes do so together."""
        if self.model is None:
            self.model = self.load().eval().requires_grad_(False)

    def release(self) -> None:
        if self.model is None:
            return
        gone, self.model = weakref.ref(self.model), None
        if gone() is not None:  # its parts point at each other
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_reference(policy: nn.Module, which: str, moves: bool = False, name: str = "reference",
                   again: Callable[[], nn.Module] | None = None) -> AdapterOff | FrozenCopy:
    """The scores of the reference for a micro-batch; `how` says how they are got. Call it before the first step.

    `initial` is the policy as it stands now; `base` the model without its adapter. A fresh LoRA adapter changes nothing, so both are
    the adapter switched off; an adapter loaded from disk makes them differ, and so does a reference that `moves` (is refreshed on the
    way). Of a diffusion model the whole is then copied. The copy shares dtype, attention and device with the policy. `name` tells several
    copies of one adapter apart. A policy that is split over processes cannot be copied: `again` loads it once more.
    """
    cfg = getattr(policy, "cfg", None)
    if cfg is not None and cfg.frozen and not (hasattr(policy, "denoiser") and (cfg.adapter or moves) and which != "base"):
        return AdapterOff(policy) if which == "base" or not (cfg.adapter or moves) else AdapterCopy(policy, name)
    if which == "base":
        raise UserError("reference.policy=base means the model without its adapter, and there is none; use reference.policy=initial")
    return FrozenCopy(policy, again() if again and getattr(policy, "hooks", None) else None)
