"""The policy a config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.config.schema import DataConfig, ModelConfig, NoiseConfig, TrustConfig


def load_policy(cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int,
                quantity: str = "token_logp", noise: NoiseConfig | None = None, split: dict[str, Any] | None = None) -> nn.Module:
    """A module whose `forward(micro)` gives token log-probs [N], with `tokenise`, `generate`, `trainable`, `save`; or with
    `quantity` reward one reward per edge [E], and no `generate`. Where `cfg.start` is to count, `cfg` comes from `start.started`.

    `split`: DeepSpeed's JSON of ZeRO stage 3; all processes then load the model together, and each holds a part (`policies/split.py`).
    """
    if quantity == "reward":
        from prefopt.policies.reward_model import RewardModel, RewardTable

        return RewardTable(device) if cfg.kind == "tabular" else RewardModel(cfg, data, trust, device, precision, seed, split)
    if cfg.kind == "tabular":
        from prefopt.policies.tabular import Tabular

        table = Tabular(device)
        if cfg.start:
            table.restore(Path(cfg.path))
        return table
    if cfg.kind == "diffusion":
        from prefopt.policies.pipeline import load_diffusion

        return load_diffusion(cfg, device, precision, seed, noise or NoiseConfig())
    from prefopt.policies.causal_lm import CausalLM

    return CausalLM(cfg, data, trust, device, precision, seed, split)
