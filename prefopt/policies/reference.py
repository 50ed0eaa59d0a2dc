"""Who the log-ratios are taken against, and how its scores are got: adapter off, or a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prefopt.data.batch import MicroBatch
from prefopt.errors import UserError

Provider = Callable[[MicroBatch], Tensor]


def make_reference(policy: nn.Module, which: str) -> tuple[Provider, str]:
    """(scores of the reference for a micro-batch, a phrase saying how). Call it before the first step.

    `initial` is the policy as it stands now; `base` the model without its adapter. A fresh LoRA adapter changes nothing, so both are
    the adapter switched off; an adapter loaded from disk makes them differ. The copy shares dtype, attention and device with the policy.
    """
    lora = getattr(getattr(policy, "cfg", None), "lora", None)
    if lora is not None and lora.enabled:
        if which == "base" or not lora.adapter:
            return _adapter_off(policy), "adapter off"
        return _initial_adapter(policy), "frozen copy of the initial adapter"
    if which == "base":
        raise UserError("reference.policy=base means the model without its adapter, and there is none; use reference.policy=initial")
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def score(micro: MicroBatch) -> Tensor:
        return frozen(micro)

    return score, "frozen copy"


def _adapter_off(policy) -> Provider:
    @torch.no_grad()
    def score(micro: MicroBatch) -> Tensor:
        was_training = policy.training
        policy.eval()
        try:
            with policy.without_adapter():
                return policy(micro)
        finally:
            policy.train(was_training)

    return score


def _initial_adapter(policy) -> Provider:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = policy.model
    with torch.random.fork_rng(devices=[]):  # the new adapter is drawn at random before it is overwritten
        model.add_adapter("reference", model.peft_config["default"])
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="default"), adapter_name="reference")
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}

    def activate(adapter: str) -> None:
        model.base_model.set_adapter(adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".reference." not in name and trainable[name])

    activate("default")
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}

    @torch.no_grad()
    def score(micro: MicroBatch) -> Tensor:
        was_training = policy.training
        policy.eval()
        activate("reference")
        try:
            return policy(micro)
        finally:
            activate("default")
            policy.train(was_training)

    return score
