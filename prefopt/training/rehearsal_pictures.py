"""The dry run of a diffusion model: its network, cut down, takes a step on noise. See `rehearsal`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prefopt.config.schema import TrainConfig
from prefopt.policies.denoiser_flops import caption_shapes
from prefopt.policies.denoisers import FAMILIES, Denoiser
from prefopt.policies.lora_export import add_lora
from prefopt.policies.pipeline_folder import PipelineFolder
from prefopt.policies.recompute import checkpoint_blocks
from prefopt.policies.user_branch import add_user_branch
from prefopt.training.engine import parameter_groups
from prefopt.training.parallel import Replicated
from prefopt.training.plan_pictures import folder_of
from prefopt.training.rehearsal import Rehearsed, rehearsed, storages
from prefopt.training.timing import Clock, watch

SIDE = 16  # places of a latent's side
# What of a network's config makes it small, whatever else it says: two layers, few channels.
NARROW = {"num_layers": 2, "num_single_layers": 2, "layers_per_block": 1, "num_attention_heads": 2, "num_cross_attention_heads": 2}


@dataclass(frozen=True)
class CutFolder(PipelineFolder):
    """A pipeline's configs, its network's cut down."""

    whole: PipelineFolder | None = None

    def config(self, part: str) -> dict[str, Any]:
        return cut(self.whole.config(part)) if part == self.network else self.whole.config(part)


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a UNet or of a transformer of the same kind, with few weights."""
    out = {**config, **{name: value for name, value in NARROW.items() if config.get(name) is not None}}
    if "block_out_channels" in config:  # heads divide channels, and so do the groups of norms
        groups = config.get("norm_num_groups") or 32
        out["block_out_channels"] = [2 * groups] * len(config["block_out_channels"])
        out["attention_head_dim"] = 2 if isinstance(config.get("attention_head_dim"), int) else [2] * len(config["block_out_channels"])
        if isinstance(config.get("transformer_layers_per_block"), list):
            out["transformer_layers_per_block"] = [1] * len(config["transformer_layers_per_block"])
    if "dual_attention_layers" in config:
        out["dual_attention_layers"] = [0] if config["dual_attention_layers"] else []
    inner = 2 * (config.get("attention_head_dim") or 0) if "num_attention_heads" in config and "block_out_channels" not in config else 0
    if inner:  # some widths must be those of the heads
        for name in ("caption_projection_dim", "cross_attention_dim"):
            if config.get(name) is not None:
                out[name] = inner
        if config.get("cross_attention_head_dim") is not None:
            out["cross_attention_dim"] = 2 * config["cross_attention_head_dim"]
    return out


class Noise(nn.Module):
    """The denoiser as a policy whose loss is how far its prediction is from zero."""

    def __init__(self, denoiser: Denoiser, precision: str):
        super().__init__()
        self.denoiser, self.network, self.precision = denoiser, denoiser.network, precision

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            return self.denoiser.predict(x, t, cond).float().square().mean()


def step_of_pictures(cfg: TrainConfig, settings: dict[str, Any] | None, accelerator: Accelerator) -> Rehearsed:
    """Two steps of one micro-batch with one picture."""
    policy = Noise(_denoiser(cfg), cfg.hardware.precision)
    denoiser, user = policy.denoiser, cfg.model.user_width
    x = torch.zeros(1, denoiser.latent_channels, SIDE, SIDE)
    t = torch.zeros(1) if denoiser.process.kind == "flow" else torch.zeros(1, dtype=torch.long)
    cond = {name: torch.ones(1, *shape) for name, shape in caption_shapes(denoiser).items()}
    if user is not None:
        cond["user"] = torch.zeros(1, 1, user)
    others = storages().keys() - {p.untyped_storage()._cdata for p in (*policy.parameters(), *policy.buffers())}
    optimizer = torch.optim.AdamW(parameter_groups(policy, cfg.optim.weight_decay), lr=cfg.optim.lr, fused=True)
    if settings:
        from prefopt.training.zero import Zero

        parallel: Any = Zero(policy, optimizer, settings, accelerator)
    else:
        parallel = Replicated(policy, optimizer, accelerator)

    watch(parallel.model, Clock(accelerator.device))

    def step() -> None:
        with parallel.synced(last=True):
            parallel.backward(parallel.model(x, t, cond))
        parallel.clip(cfg.optim.max_grad_norm)
        parallel.update()
        parallel.clear()

    return rehearsed(type(denoiser.network).__name__, policy, step, others, 1, 2)


def _denoiser(cfg: TrainConfig) -> Denoiser:
    import diffusers

    whole, model = folder_of(cfg.model), cfg.model
    folder = CutFolder(whole.path, whole.pipeline, whole.index, whole.asked, whole)
    kind, config = getattr(diffusers, folder.parts[folder.network][1]), folder.config(folder.network)
    network = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")}).train()
    denoiser = FAMILIES[folder.pipeline](folder, network, SIDE * folder.latent[1])
    if model.gradient_checkpointing:
        checkpoint_blocks(network, model.recompute)
    if model.frozen and cfg.hardware.precision == "bf16":
        network.to(torch.bfloat16)
    if model.lora.enabled:
        add_lora(denoiser, replace(model.lora, adapter=None), cfg.seed)
    elif model.user_width is not None:
        add_user_branch(denoiser, model.user_width, cfg.seed)
    return denoiser
