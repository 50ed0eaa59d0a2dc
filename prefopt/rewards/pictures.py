"""Rewards of pictures that need no large model: the known reward of a generated world, and BRISQUE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.records import BadRow, Example
from prefopt.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

WORLDS = ("tiny_pictures",)
PARTS = ("count", "colour", "shape", "place")  # of what a caption asks for
LOOK = "aesthetic"  # what the world likes to see beside them


def picture(example: Example) -> Image:
    """The picture that is the example's first completion, in RGB. Raises `UserError` where there is none, or none that can be read."""
    from prefopt.data.pictures import load_picture

    part = example.completions[0].picture
    where = example.origin or f"'{example.prompt_text[:60]}'"
    if part is None:
        raise UserError(f"{where}: this reward judges pictures, and the completion is a text; choose another reward")
    try:
        return load_picture(part)
    except BadRow as reason:
        raise UserError(f"{where}: {reason}") from reason


def known(world: str) -> Callable[[Sequence[Example]], list[float]]:
    """The true reward of a world in `WORLDS`, in nats of Bradley-Terry."""
    from prefopt.data import tiny_pictures

    judge = {"tiny_pictures": tiny_pictures.true_reward}[world]
    return lambda examples: [judge(example.prompt_text, picture(example)) for example in examples]


def parts(world: str) -> Callable[[str, Image], dict[str, float]] | None:
    """(caption, picture) -> how far each part of what the caption asks for is met, in [0, 1], and the picture's `LOOK`, in [-1, 1], which
    no caption asks for; None outside the worlds in `WORLDS`."""
    from prefopt.data import tiny_pictures

    if world not in WORLDS:
        return None

    def seen(caption: str, image: Image) -> dict[str, float]:
        found = tiny_pictures.measures(caption, image)
        return {name: found[name] for name in (*PARTS, LOOK)}

    return seen


class Brisque:
    """r(x) = -BRISQUE(x): quality without a reference picture and without a caption (Mittal et al. 2012, IEEE TIP 21(12)), in [-100, 0].

    BRISQUE is a regression, fitted to opinions of distorted photographs, on how far the statistics of neighbouring pixels are from those
    of natural photographs; 0 is the best. Its values are cut to [0, 100], the range that it was fitted in: far from photographs (drawings,
    a few dozen pixels) it leaves that range, either way, and says little. A picture of one colour has no such statistics and counts as the
    worst. The features and the fitted weights are those of the PyPI package brisque.
    """

    def __init__(self):
        try:
            from brisque import BRISQUE
        except ImportError as error:
            raise UserError(f"reward=brisque needs the package brisque, which cannot be imported ({error}); install it: "
                            "pip install 'prefopt[brisque]'") from error
        self.model = BRISQUE(url=False)
        scaled = self.model.scale_features
        # The package makes some features arrays of one number, which numpy from 2.4 on no longer takes for numbers.
        self.model.scale_features = lambda features: scaled([np.asarray(f).item() for f in features])
        self.source = "PyPI package brisque"

    def __call__(self, examples: Sequence[Example]) -> list[float]:
        return [self.score(picture(example)) for example in examples]

    def score(self, image: Image) -> float:
        """Of one picture."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found = float(self.model.score(np.asarray(image)))
        return -min(max(found, 0.0), 100.0) if math.isfinite(found) else -100.0
