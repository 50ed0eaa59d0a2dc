"""`prefopt data check` for rows with images: what is in them, and a sheet of pictures to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.listing import table
from prefopt.config.schema import DataConfig, ModelConfig
from prefopt.data.dataset import reduce_ranking
from prefopt.data.fits import check_use
from prefopt.data.pictures import Framing, count_notes, identity, load_picture, same, size_of
from prefopt.data.records import BadRow, Example
from prefopt.data.sources import Rejected, Split
from prefopt.data.transforms import transform_lines
from prefopt.errors import UserError
from prefopt.report.picture_grid import sheet

if TYPE_CHECKING:
    from PIL.Image import Image

DECODED = 1000  # images that are decoded, not only looked up
ROWS = 24  # of the contact sheet
SIDE = 144  # pixels of a thumbnail


def picture_lines(
    split: Split, cfg: DataConfig, model: ModelConfig, view: str, columns: tuple[str, ...], percentiles: Callable[..., list[int]]
) -> list[str]:
    """The report on a split's images. Moves rows that a run would refuse from its examples to its rejected ones; raises `UserError` where
    the objective could read none."""
    framing = Framing.of(cfg, model.resolution)
    frames: Counter[tuple[int, int]] = Counter()
    notes: Counter[str] = Counter()
    shapes: dict[str, list[int]] = {"height": [], "width": []}
    usable, images, decoded, seen = [], set(), 0, Counter()
    for example in split.examples:
        check_use(example, cfg, view, columns)
        example = reduce_ranking(example, "all" if view == "ranking" else cfg.pairs)
        parts = [c.picture for c in example.completions]
        try:
            frame = framing.size(parts)
            ids = [identity(part) for part in parts]
            if len(ids) > 1 and ids[0] == ids[-1] and example.completions[0].text == example.completions[-1].text:
                raise same(example, parts[0], parts[-1])
            for part, own in zip(parts, ids, strict=True):
                if own not in images and decoded < DECODED:
                    load_picture(part)
                    decoded += 1
        except BadRow as reason:
            split.rejected.append(Rejected(example.origin, str(reason)))
            continue
        usable.append(example)
        images.update(ids)
        seen[example.prompt_text, *ids] += 1
        frames[frame] += len(parts)
        count_notes(parts, frame, notes)
        for part in parts:
            height, width = size_of(part)
            shapes["height"].append(height)
            shapes["width"].append(width)
    split.examples = usable
    counts = f"{len(usable)} usable rows, {len(split.rejected)} broken"
    if split.no_preference:
        counts += f", {split.no_preference.total()} without a preference"
    lines = [f"{split.name}: {counts}"]
    if not usable:
        return lines
    kinds = Counter(e.kind for e in usable)
    about = [("note", note) for note in split.notes]
    about += [(f"transform {name}", done) for name, done in transform_lines(split)]
    about += [("kinds", ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))]
    if unused := sorted({key for e in usable for key in e.meta}):
        about.append(("columns not used", ", ".join(unused)))
    about += [("no preference", f"{count}: {reason}") for reason, count in split.no_preference.most_common()]
    about += [
        ("images", f"{frames.total()}, {len(images)} of them distinct; the first {decoded} were decoded"),
        ("captions", f"{len({e.prompt_text for e in usable})} distinct; {sum(bool(c.text) for e in usable for c in e.completions)} images "
                     "have one of their own"),
        ("used at", ", ".join(f"{w} x {h}: {n}" for (h, w), n in frames.most_common())),
    ]  # fmt: skip
    if done := ", ".join(f"{n} {what}" for what, n in notes.items() if n):
        about.append(("done to images", done))
    about += [("duplicates", f"{sum(n - 1 for n in seen.values())} rows repeat an earlier one"), ("ties", _ties(usable))]
    header = ("pixels", "5 %", "50 %", "95 %", "max")
    letters = [len(e.prompt_text) for e in usable]
    body = [(name, *map(str, percentiles(v))) for name, v in [*shapes.items(), ("caption, letters", letters)] if v]
    return [*lines, *table(about, "  "), *table([header, *body], "  ")]


def _ties(examples: Sequence[Example]) -> str:
    rankings = [e.completions for e in examples if e.kind == "ranking"]
    tied = sum(len({c.score for c in completions}) < len(completions) for completions in rankings)
    soft = [e.label for e in examples if e.kind == "pair" and e.label not in (0.0, 1.0)]
    return f"{tied} of {len(rankings)} rankings have equal scores; {sum(x == 0.5 for x in soft)} of {len(soft)} soft labels are 0.5"


def write_sheet(file: str, examples: Sequence[Example], framing: Framing, names: Callable[[Example], list[str]]) -> str:
    """Draws some rows, evenly spread, each image cut as a model would see it, and says where. Raises `UserError` where it cannot write."""
    step = max(len(examples) / ROWS, 1.0)
    shown: list[tuple[str, list[tuple[str, Any]]]] = []
    for example in (examples[int(i * step)] for i in range(min(ROWS, len(examples)))):
        height, width = framing.size([c.picture for c in example.completions])
        pictures = [(name, _thumbnail(load_picture(c.picture), height / width))
                    for name, c in zip(names(example), example.completions, strict=False)]
        shown.append((example.prompt_text, pictures))
    path = Path(file).expanduser()
    try:
        sheet(shown).save(path, "PNG")
    except OSError as error:
        raise UserError(f"sheet={file}: it cannot be written ({error.strerror or error}); choose another file, or sheet=null") from error
    return f"contact sheet of {len(shown)} training rows: {path}"


def _thumbnail(image: Image, aspect: float) -> Image:
    """The part that a model sees, within `SIDE` pixels."""
    from PIL import Image, ImageOps

    size = (SIDE, round(SIDE * aspect)) if aspect <= 1 else (round(SIDE / aspect), SIDE)
    method = Image.Resampling.NEAREST if max(image.size) < SIDE else Image.Resampling.LANCZOS  # small pixels stay pixels
    return ImageOps.fit(image, size, method)
