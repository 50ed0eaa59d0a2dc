"""Measures of sampled pictures that need no model: how they match, how they differ from each other, and what reward hacking does to them.

Measures are vectors with one value per prompt (see prefopt.report.estimators); the Fréchet distance is one number of two sets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.report.estimators import Z95, by_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 64  # pixels at which features are taken
CHANNELS = (3, 16, 32, 32)
RIGHT = 0.5  # a part of a prompt counts as met above this


RESAMPLES = 200


def measures(images: Sequence[Image]) -> dict[str, np.ndarray]:
    """`saturation`, `high_frequency` and `variety` of one picture for each prompt."""
    out = {"saturation": saturation(images), "high_frequency": high_frequency(images)}
    return out | ({"variety": variety(features(images))} if len(images) > 1 else {})


def distance(images: Sequence[Image], others: Sequence[Image]) -> np.ndarray:
    """[n] Euclidean distance between the features of two pictures of the same prompt, one of each list. 0 for equal pictures."""
    return np.linalg.norm(features(images) - features(others), axis=-1)


def prompt_match(parts: Sequence[Mapping[str, float]], prompts: Sequence[Hashable]) -> dict[str, np.ndarray]:
    """How far pictures show what was asked: each of `parts` names what a prompt asks for and how far a picture meets it, in [0, 1].

    One value per prompt of every part (`match/count` and so on), of `prompt_match` (the mean over a picture's parts) and of `all_parts`
    (1 where each part is above 0.5, else 0: as in GenEval, arXiv 2310.11513, a picture is right only as a whole), whose means are the
    means over pictures.
    """
    values = {name: [picture[name] for picture in parts] for name in parts[0]}
    table = np.array(list(values.values()), dtype=float)  # [parts, pictures]
    every = {f"match/{name}": found for name, found in values.items()}
    every |= {"prompt_match": table.mean(0), "all_parts": (table > RIGHT).all(0).astype(float)}
    return {name: by_prompt(np.asarray(found, dtype=float), prompts) for name, found in every.items()}


def diversity(found: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """[G] mean Euclidean distance between the features [n, d] of two pictures of a prompt, over the G prompts that have two or more.

    0 where a prompt has the same picture every time. Only differences between runs mean something: the unit is that of the features.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    out = []
    for members in rows.values():
        if len(members) > 1:
            gaps = np.linalg.norm(found[members][:, None] - found[members][None], axis=-1)
            out.append(gaps.sum() / (len(members) * (len(members) - 1)))
    return np.array(out)


def variety(found: np.ndarray) -> np.ndarray:
    """[G] values whose mean is the mean Euclidean distance between the features [G, d] of pictures of two different prompts.

    Falls when all pictures become alike, whatever was asked for. A mean over pairs, so the values are m + 2 (own mean distance - m): their
    spread is its sampling error (Hoeffding 1948). Raises ValueError for fewer than two pictures.
    """
    if len(found) < 2:
        raise ValueError("variety needs at least two pictures")
    own = np.linalg.norm(found[:, None] - found[None], axis=-1).sum(1) / (len(found) - 1)
    return own.mean() + 2 * (own - own.mean())


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of features [n, d] and [m, d], as of normal distributions with their means and covariances.

    Of `features` it is no FID (arXiv 1706.08500), which uses a trained network: compare it with other values of this function only, and
    between sets of the same size, as few pictures make it larger. 0 for equal sets. Raises ValueError for fewer than two pictures.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a Fréchet distance needs at least two pictures on either side")
    moments = [(x.mean(0), np.cov(x, rowvar=False, ddof=1).reshape(x.shape[1], -1)) for x in (np.asarray(first), np.asarray(second))]
    return frechet_of_normals(*moments[0], *moments[1])


def frechet_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """(`frechet`, ends of its 95 % interval) of pictures of the same prompts in the same order: the standard error is that of prompts drawn
    anew with replacement, for both sets alike. Its bias (upwards, with few pictures) stays; the lower end is never below 0."""
    value, rng = frechet(first, second), np.random.default_rng(0)
    draws = (rng.integers(0, len(first), len(first)) for _ in range(RESAMPLES))
    error = float(np.std([frechet(first[rows], second[rows]) for rows in draws], ddof=1))
    return value, max(0.0, value - Z95 * error), value + Z95 * error


def frechet_of_normals(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^(1/2) C_2 C_1^(1/2))^(1/2)): the squared 2-Wasserstein distance of N(m_1, C_1), N(m_2, C_2)."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ other_covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    gap = float(((mean - other_mean) ** 2).sum())
    return max(0.0, gap + float(np.trace(covariance) + np.trace(other_covariance) - 2 * cross))


# ---- features ------------------------------------------------------------------------------------


@cache
def _kernels() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = zip(CHANNELS, CHANNELS[1:], strict=False)
    return tuple(torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5 for before, after in shapes)


def features(images: Sequence[Image]) -> np.ndarray:
    """[n, 64] features of pictures: mean and standard deviation over places of 32 channels of a random convolutional network.

    Three layers of 3 x 3 kernels with stride 2 and ReLU, drawn once for all (seed 0, scaled as by He et al.), on the picture at 64 x 64
    pixels in [-1, 1]. Nothing is downloaded. They see colours, edges and textures up to 15 pixels of 64, but not what a picture shows.
    """
    out = []
    for image in images:
        pixels = torch.from_numpy(np.array(image.convert("RGB").resize((SIDE, SIDE), 4))).permute(2, 0, 1).float()  # 4: box filter
        x = (pixels / 127.5 - 1)[None]
        for kernel in _kernels():
            x = F.relu(F.conv2d(x, kernel, stride=2))
        x = x[0].flatten(1)
        out.append(torch.cat([x.mean(1), x.std(1)]))
    return torch.stack(out).double().numpy()


def saturation(images: Sequence[Image]) -> np.ndarray:
    """[n] mean saturation of the pixels, (max - min) / max over red, green and blue, in [0, 1]; black has 0. Rises under many scorers."""
    out = []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
        high, low = pixels.max(-1), pixels.min(-1)
        out.append(((high - low) / np.maximum(high, 1)).mean())
    return np.array(out)


def high_frequency(images: Sequence[Image]) -> np.ndarray:
    """[n] share of a picture's contrast that is finer than a quarter cycle per pixel, in [0, 1]: noise 0.80, most photographs below 0.05.

    Of the grey picture less its mean, energy of the discrete Fourier transform at |f| > 1/4 over all energy; 0 for one grey. Falls when
    pictures become blurred or flat, rises with noise and over-sharpening.
    """
    out = []
    for image in images:
        grey = np.asarray(image.convert("L"), dtype=float)
        energy = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
        far = np.hypot(*(np.fft.fftfreq(n).reshape(shape) for n, shape in zip(grey.shape, ((-1, 1), (1, -1)), strict=True))) > 0.25
        out.append(energy[far].sum() / energy.sum() if grey.std() > 0 else 0.0)
    return np.array(out)
