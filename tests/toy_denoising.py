"""A tiny pipeline as a policy, with made-up latents and embeddings in place of pictures and captions: no VAE, no text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prefopt.config.schema import DataConfig, LoraConfig, ModelConfig, NoiseConfig
from prefopt.data.batch import MicroBatch, Row, build
from prefopt.data.latents import Encodings
from prefopt.data.pictures import Framing
from prefopt.data.tokenise import Tokens
from prefopt.policies.diffusion import DiffusionPolicy
from prefopt.policies.noise import address
from prefopt.policies.pipeline import load_diffusion
from prefopt.training.source import OfflineSource

CAPTION = {"sd15": {"prompt_embeds": (4, 16)}, "sd21": {"prompt_embeds": (4, 1024)}, "sd3": {"prompt_embeds": (4, 32), "pooled": (32,)},
           "sdxl": {"prompt_embeds": (4, 32), "pooled": (16,)}}  # fmt: skip
SHAPE = (4, 8, 8)  # of a latent at 16 pixels


def policy(folder: Path | str, noise: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, precision: str = "fp32",
           seed: int = 0, family: str = "sd15", **settings: Any) -> DiffusionPolicy:
    """The policy of a folder that `tiny_pipelines.save` wrote, which knows the captions "", a and b, and no pictures yet."""
    cfg = ModelConfig(name="toy", kind="diffusion", path=str(folder), resolution=16, latent=[4, 2], lora=LoraConfig(**(lora or {})),
                      **settings)
    made = load_diffusion(cfg, torch.device("cpu"), precision, seed, NoiseConfig(**(noise or {})))
    framing = Framing.of(DataConfig(name="toy", source="files", pictures=True), 16)
    made.encodings = Encodings(framing, {"vae": "toy", "text": "toy"}, shape=SHAPE)
    for i, caption in enumerate(("", "a", "b")):
        generator = torch.Generator().manual_seed(100 + i)
        made.encodings.add_caption(caption, {n: torch.randn(shape, generator=generator) for n, shape in CAPTION[family].items()})
    return made


def picture(policy: DiffusionPolicy, number: int, shape: tuple[int, ...] = SHAPE) -> int:
    """The address of the made-up picture of that number."""
    where = address("toy picture", number)
    policy.encodings.add_latent(where, torch.randn(shape, generator=torch.Generator().manual_seed(number)))
    return where


def rows(policy: DiffusionPolicy, count: int, held_out: bool = False, shapes: tuple[tuple[int, ...], ...] = (SHAPE,)) -> list[Row]:
    """Pairs of pictures 2i and 2i + 1 under the captions a and b in turn, of the `shapes` in turn."""
    out, numbers = [], policy.draws.numbers(held_out)
    for i in range(count):
        shape = shapes[i % len(shapes)]
        caption, pictures = policy.encodings.caption_of("ab"[i % 2]), [picture(policy, 2 * i + k, shape) for k in range(2)]
        group = address("group", caption, *sorted(pictures))
        tokens = Tokens([caption], [policy.draws.branch(p, caption, group, numbers) for p in pictures], frame=shape)
        out.append(Row(tokens, "pair"))
    return out


def micro(policy: DiffusionPolicy, rows: list[Row], visit: int = 0) -> MicroBatch:
    made = build([policy.draws.at(row, visit) for row in rows], range(len(rows)), "pairs", 0)
    made.layout.lengths = torch.ones_like(made.layout.lengths)
    return made


def source(policy: DiffusionPolicy, rows: list[Row], budget: int = 10**6, rank: int = 0, world: int = 1,
           view: str = "pairs") -> OfflineSource:
    return OfflineSource(rows, view, len(rows), budget, 0, True, 0, rank, world, policy.layout, policy.share, draws=policy.draws)
