"""`prefopt eval` and `prefopt sample` of runs whose policy makes pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.schema import SampleConfig
from prefopt.data.records import BadRow, Example
from prefopt.errors import UserError
from prefopt.report.picture_grid import sheet
from prefopt.report.picture_measures import diversity, features, frechet_interval
from prefopt.training.setup import Run

if TYPE_CHECKING:
    from PIL.Image import Image


def moved(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """(line, figures): how far a set of samples is from another of the same prompts, as a whole."""
    value, low, high = frechet_interval(*(features([sample["image"] for sample in samples]) for samples in (before, after)))
    line = (f"Fréchet distance of the pictures to the initial policy's: {value:.3g} [{low:.3g}, {high:.3g}] (of random features, no FID; "
            "compare it at equal numbers of pictures only)")
    return line, {"value": value, "low": low, "high": high}


def sample(run: Run, examples: Sequence[Example], cfg: SampleConfig, load: Callable[[], int]) -> list[str]:
    """Draws a picture for each caption before and after training, from the same noise, writes them and a sheet of both, and prints where.

    `load` gives the policy its trained weights and says after which step. Returns the paths of the trained policy's pictures.
    """
    if cfg.revise:
        raise UserError(f"revise={cfg.revise}: pictures are not revised; set revise=0")
    folder = Path(cfg.output).expanduser() if cfg.output else run.folder / "asked"
    before = _drawn(run, examples, cfg)
    step = load()
    after = _drawn(run, examples, cfg)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (example, *pair) in enumerate(zip(examples, before, after, strict=True)):
            for name, image in zip(("before", "after"), pair, strict=True):
                image.save(folder / f"{number:03d}-{name}.png")
            paths.append(str(folder / f"{number:03d}-after.png"))
            print(f"> {example.prompt_text}\n{paths[-1]}")
        rows = [(e.prompt_text, [("before", old), (f"step {step}", new)]) for e, old, new in zip(examples, before, after, strict=True)]
        sheet(rows).save(folder / "before-and-after.png")
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"{folder}: pictures cannot be written there ({said}); name another folder with output=") from error
    if cfg.prompt is not None and len(examples) > 1:
        old, new = (float(diversity(features(images), [0] * len(images))[0]) for images in (before, after))
        print(f"diversity of the {len(examples)} pictures (mean distance of random features): {old:.3f} before, {new:.3f} after")
    print(f"before and after {step} steps side by side: {folder / 'before-and-after.png'}")
    return paths


def _drawn(run: Run, examples: Sequence[Example], cfg: SampleConfig) -> list[Image]:
    policy = run.engine.policy
    try:
        ids = [policy.prompt_ids(example.prompt, example.chat) for example in examples]
    except BadRow as reason:
        raise UserError(f"the prompt: {reason}") from reason
    return [drawing.image for drawing in policy.generate(ids, cfg.sampler, cfg.seed)]
