"""Pictures for people to look at: one sheet with captions, and pictures inside a page that needs no other file."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.report.plots import finite

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST, SMALLEST = 320, 160  # pixels of the longer side of a picture in a page
STRIPS, STEPS = 4, 6  # prompts that are shown over training, and evaluations of each
MARGIN, LINES, LINE, FONT = 8, 3, 16, 12  # of a sheet: pixels around a picture, lines of a caption, their height and that of letters


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image]]]], columns: int = 2) -> Image:
    """Rows of pictures in so many columns: the pictures of a row beside one another, each with its name above, and the row's caption below
    (at most three lines of it).

    Cells are as large as the largest picture; small pictures are enlarged by a whole factor, without smoothing. Raises ValueError where
    there is nothing to show.
    """
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    if not any(pictures for _, pictures in rows) or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns: {len(rows)} rows and {columns} were given")
    shown = [[(name, _enlarged(image.convert("RGB"))) for name, image in pictures] for _, pictures in rows]
    cell_wide, cell_high = (max(image.size[axis] for row in shown for _, image in row) for axis in (0, 1))
    wide = max(map(len, shown)) * (cell_wide + MARGIN) + MARGIN
    font = ImageFont.load_default(FONT)
    letters = max(12, int((wide - 2 * MARGIN) / font.getlength("n")))
    texts = [textwrap.wrap(caption, letters, max_lines=LINES, placeholder=" …") for caption, _ in rows]
    above = LINE if any(name for row in shown for name, _ in row) else 0
    high = above + cell_high + LINE * max(map(len, texts)) + 2 * MARGIN
    page = pil.new("RGB", (columns * wide, -(-len(rows) // columns) * high), "white")
    draw = ImageDraw.Draw(page)
    for number, (row, lines) in enumerate(zip(shown, texts, strict=True)):
        x, y = number % columns * wide + MARGIN, number // columns * high + MARGIN
        for place, (name, image) in enumerate(row):
            left = x + place * (cell_wide + MARGIN)
            draw.text((left, y), name, fill="dimgray", font=font)
            page.paste(image, (left + (cell_wide - image.width) // 2, y + above + (cell_high - image.height) // 2))
        draw.multiline_text((x, y + above + cell_high + 2), "\n".join(lines), fill="black", font=font)
    return page


def data_uri(folder: Path, name: str) -> str:
    """The picture in `name`, a path relative to the run's folder, for an img element; empty where it is none or lies outside."""
    from PIL import Image as pil

    try:
        path = (Path(folder) / name).resolve()
        if not path.is_relative_to(Path(folder).resolve()):
            return ""
        with pil.open(path) as opened:
            image = opened.convert("RGB")
    except Exception:  # missing, damaged, far too large: a page shows what there is
        return ""
    image.thumbnail((LARGEST, LARGEST))
    image, held = _enlarged(image), io.BytesIO()
    if max(image.size) <= SMALLEST:
        image.save(held, "PNG", optimize=True)
    else:
        image.save(held, "JPEG", quality=88)
    kind = "png" if max(image.size) <= SMALLEST else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"


def _enlarged(image: Image) -> Image:
    """A picture of a few dozen pixels, each pixel as a square."""
    factor = SMALLEST // max(image.size)
    return image if factor < 2 else image.resize((image.width * factor, image.height * factor), 0)


def of_row(row: Mapping[str, Any]) -> str | None:
    """The file that a row of samples.jsonl names, if it is a picture."""
    name = row.get("image")
    return name if isinstance(name, str) and name else None


def over_training(steps: Mapping[float, Mapping[Any, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The first prompts with their pictures at evaluations spread over the run, the first and the last among them. `steps`: step -> prompt
    id -> row. Empty for texts, and where there are two evaluations or fewer, which stand before and after."""
    order = sorted(steps)
    if len(order) < 3:
        return []
    count = min(STEPS, len(order))
    chosen = [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)]
    last = steps[order[-1]]
    ids = [key for key in sorted(last, key=lambda k: (isinstance(k, str), k)) if of_row(last[key])][:STRIPS]
    return [
        {"id": key, "prompt": str(last[key].get("prompt") or ""),
         "cells": [{"step": step, "image": of_row(row), "reward": finite(row.get("reward"))}
                   for step in chosen if (row := steps[step].get(key)) and of_row(row)]}
        for key in ids
    ]  # fmt: skip
