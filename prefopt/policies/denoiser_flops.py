"""Floating-point operations of a denoiser: its forward pass over one latent, run once on meta tensors, which have shapes and no numbers.

torch's counter counts products of matrices and convolutions, a multiplication and its addition as two; attention is counted as the products
that it is made of. Norms and activation functions are left out, as is customary. A batch of B latents takes B times as much.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prefopt.policies.denoisers import FAMILIES, Denoiser
from prefopt.policies.pipeline_folder import PipelineFolder

ATTENTION = ("aten.bmm", "aten.baddbmm")  # products of activations with one another; weights are multiplied by other operators


@dataclass(frozen=True)
class DrawShape:
    """FLOPs of one forward pass over one latent: `matrices` with weights, `products` of attention, `adapter` with low-rank weights;
    `convolutions` are a part of `matrices`. `parameters`: of the network, in numbers."""

    matrices: float
    products: float
    parameters: int
    adapter: float = 0.0
    convolutions: float = 0.0

    def forward(self, draws: float, adapted: bool = True) -> float:
        """FLOPs of one forward pass over so many latents, with the adapter or without."""
        return draws * (self.matrices + self.products + adapted * self.adapter)

    def again(self, draws: float, recompute: str) -> float:
        """FLOPs of what the backward pass computes again (`policies/recompute.py`): all, or cheap: no convolution and no attention."""
        kept = self.convolutions + self.products if recompute == "cheap" else 0.0
        return self.forward(draws) - draws * kept if recompute else 0.0

    def step(self, draws: float, frozen: bool = False) -> float:
        """FLOPs of a forward and a backward pass: three times a forward pass, of `frozen` weights (LoRA) twice; attention and the adapter
        cost three in either case. The first layer, and below it the first adapter, need less: some per cent of U-Nets under LoRA."""
        return draws * ((2 if frozen else 3) * self.matrices + 3 * (self.products + self.adapter))


def shape_of_denoiser(denoiser: Denoiser, resolution: int, adapter: dict[str, nn.Parameter] | None = None) -> DrawShape | None:
    """Of a denoiser at `resolution` (pixels of a side), with the trained matrices of its `adapter` by name. None, after a line that says
    why, where a forward pass on meta tensors fails: its FLOPs are then unknown."""
    try:
        shape, places = counted(meta_denoiser(denoiser.folder, resolution, denoiser.network), resolution)
        return replace(shape, adapter=low_rank(adapter or {}, places))
    except Exception as error:  # an operator or a code path that needs numbers
        print(f"model: the FLOPs of its {type(denoiser.network).__name__} are not counted ({type(error).__name__}: {str(error)[:200]})",
              file=sys.stderr)
        return None


def low_rank(adapter: dict[str, nn.Parameter], places: dict[str, float]) -> float:
    """FLOPs of a forward pass through low-rank matrices, each called after the layer that it stands beside ([network.]LAYER.lora_A...), of
    which `places` says how many vectors go through. What else is trained, such as an objective's own small module, is left out."""
    layers = {name: name.partition(".lora_")[0].removeprefix("network.") for name in adapter if ".lora_" in name}
    return sum(2.0 * adapter[name].numel() * places[layer] for name, layer in layers.items())


def counted(denoiser: Denoiser, resolution: int) -> tuple[DrawShape, dict[str, float]]:
    """(the shape of a denoiser on the meta device, which has no adapter; of each layer, how many vectors of a latent go through)."""
    side, places = resolution // denoiser.factor, {}

    def seen(name: str):
        def note(module: nn.Module, _: Any, out: Tensor) -> None:
            width = module.out_features if isinstance(module, nn.Linear) else out.shape[1]
            places[name] = places.get(name, 0.0) + out.numel() / width
        return note

    for name, module in denoiser.network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(seen(name))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        cond = {name: torch.empty(1, *shape) for name, shape in caption_shapes(denoiser).items()}
        denoiser.call(torch.empty(1, denoiser.latent_channels, side, side), torch.empty(1), cond, torch.empty(1, 6))
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for operator, flops in by_operator.items() if operator in ATTENTION)
    total, parameters = counter.get_total_flops(), sum(p.numel() for p in denoiser.network.parameters())
    convolutions = float(by_operator.get("aten.convolution", 0))
    return DrawShape(float(total - products), float(products), parameters, convolutions=convolutions), places


def meta_denoiser(folder: PipelineFolder, resolution: int, like: nn.Module | None = None) -> Denoiser:
    """The denoiser of a pipeline folder on the meta device, from its configs alone; or one `like` a network that is there."""
    import diffusers

    kind = type(like) if like is not None else getattr(diffusers, folder.parts[folder.network][1])
    config = dict(like.config) if like is not None else folder.config(folder.network)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # nothing is drawn, and no seed of the run's is used up
        made = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")}).train()
    return FAMILIES[folder.pipeline](folder, made, resolution)


def caption_shapes(denoiser: Denoiser) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a caption is encoded to, by name, as the pipeline encodes it."""
    folder, config, pipeline = denoiser.folder, denoiser.network.config, denoiser.folder.pipeline
    longest = folder.max_sequence_length or 0
    if pipeline.startswith(("PixArt", "Sana")):
        return {"prompt_embeds": (longest, config["caption_channels"]), "mask": (longest,)}
    if pipeline == "FluxPipeline":
        return {"prompt_embeds": (longest, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}
    clip = folder.config("text_encoder")["max_position_embeddings"]
    if pipeline == "StableDiffusion3Pipeline":  # zeros stand for a T5 that is left out
        return {"prompt_embeds": (clip + longest, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}
    width = {"prompt_embeds": (clip, config["cross_attention_dim"])}
    if pipeline == "StableDiffusionXLPipeline":
        width["pooled"] = (config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],)
    return width
