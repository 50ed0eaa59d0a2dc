"""The policy a config asks for."""

from __future__ import annotations

import torch
from torch import nn

from prefopt.config.schema import DataConfig, ModelConfig, TrustConfig


def load_policy(cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int,
                quantity: str = "token_logp") -> nn.Module:
    """A module whose `forward(micro)` gives token log-probs [N], with `tokenise`, `generate`, `trainable`, `save`; or with
    `quantity` reward one reward per edge [E], and no `generate`.
    """
    if quantity == "reward":
        from prefopt.policies.reward_model import RewardModel, RewardTable

        return RewardTable(device) if cfg.kind == "tabular" else RewardModel(cfg, data, trust, device, precision, seed)
    if cfg.kind == "tabular":
        from prefopt.policies.tabular import Tabular

        return Tabular(device)
    from prefopt.policies.causal_lm import CausalLM

    return CausalLM(cfg, data, trust, device, precision, seed)
