"""The language head of a transformers model as the tensors that the chunked ops take, adapters of PEFT included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefopt.errors import UserError
from prefopt.policies.logprob import Head


def head_of(model: Any, temperature: float = 1.0) -> Head:
    """The head of a causal LM, with or without LoRA on it, as it is at this moment: adapters that are active and not switched off.

    TypeError for a head that is no matrix product with its weight (quantised, DoRA, a copy to train) or has dropout in an adapter.
    To be called inside the model's forward pass, where weights that are partitioned over processes are whole.
    """
    layer, softcap = model.get_output_embeddings(), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    base, adapters = _parts(layer)
    if type(base) is not nn.Linear:
        raise TypeError(f"its head is a {type(base).__name__}")
    bias, downs, ups = base.bias, [], []
    for name in adapters:
        if name in layer.lora_variant:
            raise TypeError(f"the adapter on its head is a {type(layer.lora_variant[name]).__name__}")
        if getattr(layer.lora_dropout[name], "p", 0):
            raise TypeError("the adapter on its head has dropout")
        down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        downs.append(scale * down.weight)
        ups.append(up.weight)
        if up.bias is not None:
            bias = scale * up.bias if bias is None else bias + scale * up.bias
    return Head(base.weight, bias, softcap, temperature, torch.cat(downs) if downs else None, torch.cat(ups, 1) if ups else None)


def _parts(layer: nn.Module) -> tuple[nn.Module, list[str]]:
    """(the matrix, names of the adapters that add to it)."""
    if type(layer) is nn.Linear:
        return layer, []  # before peft is imported, which takes seconds
    try:
        from peft.tuners.lora import Linear
    except ImportError:
        return layer, []
    if type(layer) is not Linear:
        return layer, []
    off = layer.disable_adapters or layer.merged  # what is merged is in the matrix already
    return layer.get_base_layer(), [] if off else [name for name in layer.active_adapters if name in layer.lora_A]


def refuse_adapter_on_tied_head(model: Any, targets: str) -> None:
    """UserError for an adapter on one of two matrices that are the same: merged, it would change the other as well."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in (head, embedding)]
    if None in layers or layers[0].weight is not layers[1].weight:
        return
    if adapted := [name for name, layer, base in zip(("head", "embedding"), (head, embedding), layers, strict=True) if layer is not base]:
        raise UserError(f"{targets} puts an adapter on the {adapted[0]} of a model whose head is its embedding, so that merging it would "
                        "change both; leave it out (model.lora.targets=all-linear does)")
