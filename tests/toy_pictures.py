"""A diffusion policy of a few hundred weights and pictures that are a handful of numbers, in memory: no files, no encoders."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.schema import ModelConfig, NoiseConfig
from prefopt.data.dataset import make_dataset
from prefopt.data.pictures import Framing
from prefopt.data.records import BadRow, Example
from prefopt.data.sources import Split
from prefopt.objectives.base import Objective
from prefopt.policies.diffusion import DiffusionPolicy
from prefopt.policies.noise import address, normals
from prefopt.policies.process import Process
from prefopt.training.source import OfflineSource
from tests.toy import data_config, example

CPU = torch.device("cpu")
WIDTH = 4  # of a caption's embedding


class Book:
    """What `data/latents.py:Encodings` is to a policy. A picture's `path` is its name; those of one name before the dot look alike, and the
    numbers of "good" ones lie near 1, those of "bad" ones near -1, all others around 0. Each caption has numbers of its own."""

    framing = Framing(1)

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.mirrored, self.names, self.said, self.added = shape, {}, {}, {}, {}

    def __deepcopy__(self, memo):
        return self

    def caption_of(self, text: str) -> int:
        self.said[address("caption", text)] = text
        return address("caption", text)

    def images_of(self, row: Example) -> list[int]:
        names = [(c.picture["path"], *c.picture.get("ops", ())) for c in row.completions if c.picture]
        if len(names) > 1 and names[0] == names[-1] and row.completions[0].text == row.completions[-1].text:
            raise BadRow("chosen and rejected are the same image")
        self.names |= {address("image", *name): name for name in names}
        return [address("image", *name) for name in names]

    def add_latent(self, image: int, mean: Tensor) -> None:
        self.added[image] = mean

    def forget(self, images: Iterable[int]) -> None:
        for image in images:
            self.added.pop(image, None)

    def latent(self, image: int) -> tuple[Tensor, None]:
        if image in self.added:
            return self.added[image], None
        look = self.names[image][0].partition(".")[0]
        middle = 1.0 if look.startswith("good") else -1.0 if look.startswith("bad") else 0.0
        return middle + 0.3 * normals(self.shape, "look", look, *self.names[image][1:]), None

    def sizes(self, image: int) -> None:
        return None

    def default_sizes(self, count: int) -> None:
        return None

    def caption(self, caption: int) -> dict[str, Tensor]:
        return {"embeds": normals((WIDTH,), "embeds", self.said[caption])}


class Network(nn.Module):
    """Every prediction depends on the noised picture, the time and the caption."""

    def __init__(self, dims: int, seed: int):
        super().__init__()
        self.config = {"dims": dims}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(dims + 1 + WIDTH, 16), nn.Tanh(), nn.Linear(16, dims))

    def forward(self, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None].to(x.dtype), embeds], 1)).view_as(x)


@dataclass
class ToyDenoiser:
    network: nn.Module
    process: Process

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], sizes: None) -> Tensor:
        return self.network(x, t / (1 if self.process.kind == "flow" else self.process.steps), cond["embeds"])


def process_of(kind: str) -> Process:
    return Process(kind) if kind == "flow" else Process(kind, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


def picture_policy(kind: str = "epsilon", shape: tuple[int, int, int] = (2, 1, 1), seed: int = 0, **noise: Any) -> DiffusionPolicy:
    denoiser = ToyDenoiser(Network(math.prod(shape), seed), process_of(kind))
    cfg = ModelConfig(name="toy", kind="diffusion", resolution=shape[1], latent=[shape[0], 1])
    policy = DiffusionPolicy(cfg, NoiseConfig(**noise), denoiser, lambda: None, CPU, "fp32", seed, {"where": "toy"})
    policy.encodings = Book(shape)
    return policy


def pictured(caption: str = "a cat", chosen: Any = "good", rejected: Any = "bad", **row: Any) -> Example:
    """A pair of pictures by name, or as dicts with a caption of their own."""
    sides = (side if isinstance(side, dict) else {"image": side} for side in (chosen, rejected))
    return example(prompt=caption, **dict(zip(("chosen", "rejected"), sides, strict=True)), **row)


def ranked(caption: str, *scores: float) -> Example:
    return example(prompt=caption, completions=[{"image": f"at {s}"} for s in scores], scores=list(scores))


def rows_of(policy: DiffusionPolicy, objective: Objective, examples: list[Example], held_out: bool = False) -> list:
    tokenise = policy.tokenise_eval if held_out else policy.tokenise
    return make_dataset(Split("train", examples), data_config(pictures=True), tokenise, objective.view, objective.columns,
                        objective.mismatched, 0, extra=objective.extra).rows


def picture_source(policy: DiffusionPolicy, objective: Objective, rows: list, budget: int = 10**6, batch: int | None = None,
                   rank: int = 0, world: int = 1) -> OfflineSource:
    return OfflineSource(rows, objective.view, batch or len(rows), budget, 0, "label" in objective.columns, 0, rank, world, "draws", False,
                         draws=policy.draws)
