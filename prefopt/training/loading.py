"""Loads policies on all processes of a run: each of them whole, or under ZeRO stage 3 together, each process a part."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from prefopt.config.schema import ModelConfig, TrainConfig
from prefopt.policies.load import load_policy
from prefopt.policies.locate import locate
from prefopt.training.deepspeed_json import deepspeed_json
from prefopt.training.zero import prepared


def load(cfg: TrainConfig, model: ModelConfig, accelerator: Accelerator, quantity: str = "token_logp") -> nn.Module:
    """The policy of `model` in the run `cfg`. Every process calls it; files are fetched once. Raises `UserError`."""
    if not together(cfg, model):
        with accelerator.main_process_first():
            return again(cfg, model, accelerator, quantity)
    with accelerator.main_process_first():
        locate(model)
    return again(cfg, model, accelerator, quantity)


def again(cfg: TrainConfig, model: ModelConfig, accelerator: Accelerator, quantity: str = "token_logp") -> nn.Module:
    """The same of a model whose files are here. Where it is not loaded together, a process may call it alone."""
    split = None
    if together(cfg, model):
        prepared(accelerator)
        split = deepspeed_json(cfg)
    return load_policy(model, cfg.data, cfg.trust, accelerator.device, cfg.hardware.precision, cfg.seed, quantity, cfg.noise, split)


def together(cfg: TrainConfig, model: ModelConfig) -> bool:
    """Whether all processes load it together, and each keeps a part of it."""
    return cfg.hardware.zero == 3 and model.kind not in ("tabular", "diffusion")
