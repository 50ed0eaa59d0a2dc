"""The policy a config asks for."""

from __future__ import annotations

import torch
from torch import nn

from prefopt.config.schema import DataConfig, ModelConfig, TrustConfig


def load_policy(cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int) -> nn.Module:
    """A module whose `forward(micro) -> [N]` gives token log-probs, with `tokenise`, `generate`, `trainable`, `save`."""
    if cfg.kind == "tabular":
        from prefopt.policies.tabular import Tabular

        return Tabular(device)
    from prefopt.policies.causal_lm import CausalLM

    return CausalLM(cfg, data, trust, device, precision, seed)
