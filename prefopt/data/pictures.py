"""Images: reading them, what is known of them without decoding them, operations on them, and their way to a model's resolution.

An image part of a message names a file (`path`), a cell of a parquet file (`path`, `row`, `column`, and `index` where the cell is a list),
or holds a PIL image (`image`). Nothing is decoded before it is needed. Imports PIL and torch only where they are used.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.schema import DataConfig
from prefopt.data.records import BadRow, Example
from prefopt.errors import UserError
from prefopt.paths import store_dir

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Part = dict[str, Any]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # above it an image is taken for a decompression bomb
COLOUR, ALPHA, GREY = ("RGB", "RGBX"), ("RGBA", "LA", "PA"), ("L", "1")
ASPECT = 2.0  # a bucket's side is at most so many times the resolution, and at least the same share of it


# ---- where an image is ---------------------------------------------------------------------------------


def name_of(part: Part) -> str:
    """What an image is called, for people."""
    if "path" not in part:
        return "an image in memory"
    cell = f" row {part['row'] + 1} column {part['column']}" if "column" in part else ""
    return f"{part['path']}{cell}" + (f"[{part['index']}]" if "index" in part else "")


def bytes_of(part: Part) -> bytes:
    """An image's encoded bytes. Raises `BadRow` where there are none."""
    try:
        if "column" not in part:
            return Path(part["path"]).read_bytes()
        cell = _cells(part["path"], part["row"], part["column"])
    except OSError as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror or error})"
        raise BadRow(f"{name_of(part)}: {what}") from error
    if "index" in part:
        cell = cell[part["index"]] if cell is not None and part["index"] < len(cell) else None
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if not isinstance(cell, bytes) or not cell:
        raise BadRow(f"{name_of(part)}: the cell holds no image bytes")
    return cell


_lock = threading.Lock()


def _cells(path: str, row: int, column: str) -> Any:
    """A cell of a parquet file. Its row group is read as a whole, and the last few are kept: rows are best visited in order."""
    about = os.stat(path)
    with _lock:
        first, group = _group_of(path, about.st_mtime_ns, row)
        return _column(path, about.st_mtime_ns, group, column)[row - first].as_py()


@lru_cache(maxsize=64)
def _groups(path: str, changed: int) -> list[int]:
    """The number of the first row of each row group, and the number of all rows."""
    import pyarrow.parquet as pq

    about, firsts = pq.ParquetFile(path).metadata, [0]
    for group in range(about.num_row_groups):
        firsts.append(firsts[-1] + about.row_group(group).num_rows)
    return firsts


def _group_of(path: str, changed: int, row: int) -> tuple[int, int]:
    firsts = _groups(path, changed)
    if not 0 <= row < firsts[-1]:
        raise BadRow(f"{path}: there is no row {row + 1}")
    group = max(i for i, first in enumerate(firsts[:-1]) if first <= row)
    return firsts[group], group


@lru_cache(maxsize=4)
def _column(path: str, changed: int, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


# ---- what is known of an image without decoding it -----------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """`sha` is of the encoded bytes, the size is that of the picture as it is looked at (EXIF orientation applied)."""

    sha: str
    height: int
    width: int
    notes: str = ""  # "alpha": it has transparency; "grey"


def facts(part: Part) -> Facts:
    """Reads the bytes and the header once; what was found is kept by path, size and time of change. Raises `BadRow`."""
    if "path" not in part:
        image = part["image"]
        sha = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
        return Facts(sha, image.height, image.width, _notes(image))
    try:
        about = os.stat(part["path"])
    except OSError as error:
        raise BadRow(f"{name_of(part)}: there is no such file") from error
    key, stamp = _key(part), (about.st_size, about.st_mtime_ns)
    page = _page(part)
    with _lock:
        known = page.entries.get(key)
    if known and known[0] == stamp:
        return known[1]
    data = bytes_of(part)
    image = _opened(data, part)
    height, width = (image.width, image.height) if _turned(image, part) else (image.height, image.width)
    found = Facts(hashlib.sha256(data).hexdigest(), height, width, _notes(image))
    if time.time() - about.st_mtime > 2:  # within the resolution of its clock a file can change and keep its time
        page.note(key, stamp, found)
    return found


def identity(part: Part) -> tuple[str, ...]:
    """What tells an image from others: the sha256 of its bytes, and the operations on it."""
    return (facts(part).sha, *part.get("ops", ()))


def _key(part: Part) -> str:
    return f"{part['row']}.{part['column']}.{part.get('index', '')}" if "column" in part else Path(part["path"]).name


class _Page:
    """What is known of the images of one folder, or of one parquet file: lines that are only ever added to. A torn line is not read."""

    def __init__(self, file: Path):
        self.file, self.entries = file, {}
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        for line in lines:
            words = line.split("\t")
            if len(words) == 8 and words[7] == "." and len(words[3]) == 64:
                key, size, changed, sha, height, width, notes, _ = words
                self.entries[key] = ((int(size), int(changed)), Facts(sha, int(height), int(width), notes))

    def note(self, key: str, stamp: tuple[int, int], found: Facts) -> None:
        words = [key, *map(str, stamp), found.sha, str(found.height), str(found.width), found.notes, "."]
        with _lock:
            self.entries[key] = (stamp, found)
            if any(c in key for c in "\t\n\r"):
                return
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as stream:
                    stream.write("\t".join(words) + "\n")
            except OSError:  # it is then found out again
                pass


_pages: dict[Path, _Page] = {}


def _page(part: Part) -> _Page:
    where = os.path.abspath(part["path"] if "column" in part else os.path.dirname(part["path"]) or ".")
    file = store_dir() / "pictures" / f"{hashlib.sha256(where.encode()).hexdigest()[:32]}.tsv"
    with _lock:
        if file not in _pages:
            _pages[file] = _Page(file)
        return _pages[file]


def forget() -> None:
    """Reads what is known anew: other processes may have found out more."""
    with _lock:
        _pages.clear()


# ---- decoding ------------------------------------------------------------------------------------------


def _opened(data: bytes, part: Part) -> Image:
    """The image with its header read, if it is of a kind that is used here."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadRow(f"{name_of(part)}: it has more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # decoders raise whatever they like
        raise BadRow(f"{name_of(part)}: it is no readable image ({len(data)} bytes)") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadRow(f"{name_of(part)}: it has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 1_000_000} million")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photograph with a second view is one
        raise BadRow(f"{name_of(part)}: it has {image.n_frames} frames; only single images are read")
    if image.mode not in (*COLOUR, *ALPHA, *GREY, "P"):
        raise BadRow(f"{name_of(part)}: its channels are {image.mode}; only RGB, grey and palette images, with or without alpha, are read: "
                     "convert it to RGB")
    return image


def _turned(image: Image, part: Part) -> bool:
    """Whether EXIF exchanges height and width. A TIFF's header has done so already; a PNG without any such data is not asked, since it
    would be decoded for the question."""
    told = any(word in str(key).lower() for key in image.info for word in ("exif", "xmp"))
    if image.format == "TIFF" or image.format == "PNG" and not told:
        return False
    try:
        return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception as error:  # decoders raise whatever they like
        raise BadRow(f"{name_of(part)}: it is damaged or cut off ({str(error)[:80]})") from error


def _notes(image: Image) -> str:
    alpha = image.mode in ALPHA or "transparency" in image.info
    return "alpha" if alpha else "grey" if image.mode in GREY else ""


def load_picture(part: Part) -> Image:
    """An image in RGB: turned as its EXIF says, transparency laid on white, grey copied to three channels, then its `ops`. Raises
    `BadRow` for what is unreadable, cut off, animated, too large, or has other channels."""
    from PIL import Image, ImageOps

    image = _opened(bytes_of(part), part) if "path" in part else part["image"]
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ALPHA or "transparency" in image.info:
            over = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
        image = image.convert("RGB")
    except Exception as error:  # decoders raise whatever they like
        raise BadRow(f"{name_of(part)}: it is damaged or cut off ({str(error)[:80]})") from error
    for op in part.get("ops", ()):
        image = apply(op, image)
    return image


# ---- operations ----------------------------------------------------------------------------------------


def _blur(image: Image, sigma: float) -> Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(sigma))


def _noise(image: Image, std: float) -> Image:
    """Gaussian noise of `std` in units of the 0-255 range; it follows from the image's own pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image, dtype=np.float32)
    seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big")
    noisy = pixels + np.random.default_rng(seed).normal(0.0, std, pixels.shape)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _crop(image: Image, share: float) -> Image:
    height, width = _cropped(image.height, image.width, share)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _cropped(height: int, width: int, share: float) -> tuple[int, int]:
    return max(1, round(height * share)), max(1, round(width * share))


def _jpeg(image: Image, quality: float) -> Image:
    from PIL import Image

    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=int(quality))
    return Image.open(kept).convert("RGB")


def _flip(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


# name -> (what is done, the range of its number; None: it takes none)
OPS: dict[str, tuple[Callable[..., Any], tuple[float, float] | None]] = {
    "blur": (_blur, (0, 1000)), "crop": (_crop, (0.01, 1)), "flip": (_flip, None),
    "grey": (lambda image: image.convert("L").convert("RGB"), None), "jpeg": (_jpeg, (1, 95)), "noise": (_noise, (0, 255)),
}  # fmt: skip


def parse_op(op: str) -> tuple[str, list[float]]:
    """("blur", [2.0]) of "blur:2". Raises `BadRow`."""
    name, colon, number = op.partition(":")
    if name not in OPS:
        raise BadRow(f"there is no operation '{name}' on images (known: {', '.join(OPS)})")
    limits = OPS[name][1]
    if limits is None:
        if colon:
            raise BadRow(f"the operation {name} takes no number, and was given '{op}'")
        return name, []
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not limits[0] <= value <= limits[1]:
        raise BadRow(f"the operation '{op}' needs a number in [{limits[0]:g}, {limits[1]:g}], as in {name}:{limits[1]:g}")
    return name, [value]


def apply(op: str, image: Image) -> Image:
    """The image after an operation such as "blur:2". It follows from the image alone."""
    name, numbers = parse_op(op)
    return OPS[name][0](image, *numbers)


def check_row(example: Example) -> None:
    """What can be told of an image row without decoding anything. Raises `BadRow`: a file that is not there, an unknown operation, a first
    and a last image that are the same bytes under the same caption (files only; cells of parquet files are compared when they are read)."""
    parts = [(c.text, c.picture) for c in example.completions if c.picture]
    sizes = []
    for _, part in parts:
        for op in part.get("ops", ()):
            parse_op(op)
        if "path" in part and "column" not in part:
            try:
                sizes.append(os.stat(part["path"]).st_size)
            except OSError as error:
                raise BadRow(f"{name_of(part)}: there is no such file") from error
    if len(parts) < 2 or len(sizes) != len(parts):
        return
    (said, first), (said_last, last) = parts[0], parts[-1]
    if said == said_last and sizes[0] == sizes[-1] and first.get("ops") == last.get("ops") and bytes_of(first) == bytes_of(last):
        raise same(example, first, last)


def same(example: Example, first: Part, last: Part, how: str = "have the same bytes") -> BadRow:
    what = "chosen and rejected" if example.kind == "pair" else "the best and the worst completion"
    return BadRow(f"{what} are the same image ({name_of(first)} and {name_of(last)} {how})")


# ---- on the way to a model -----------------------------------------------------------------------------


@lru_cache
def buckets(resolution: int, step: int) -> list[tuple[int, int]]:
    """Sizes (h, w) whose sides are multiples of `step`, of about the area of `resolution` squared and never above it."""
    found = set()
    for side in range(-(-int(resolution / ASPECT) // step) * step, int(resolution * ASPECT) + 1, step):
        other = min(resolution * resolution // side // step * step, int(resolution * ASPECT))
        if other >= resolution / ASPECT:
            found |= {(side, other), (other, side)}
    return sorted(found)


@dataclass(frozen=True)
class Framing:
    """How images come to the size that a model works at. All images of a row get one size, cut from their middle, and one flip.

    `step`: sizes are buckets whose sides are its multiples, the one nearest to the row's mean aspect ratio; None: a square. `min_size`: the
    shortest side that is accepted, where what is smaller than its frame is enlarged; None: nothing is enlarged.
    """

    resolution: int
    step: int | None = None
    min_size: int | None = None
    flip: bool = False

    @classmethod
    def of(cls, cfg: DataConfig, resolution: int) -> Framing:
        if cfg.buckets and resolution % cfg.buckets:
            raise UserError(f"data.buckets={cfg.buckets} does not divide the model's resolution of {resolution} pixels")
        return cls(resolution, cfg.buckets, cfg.min_size, cfg.flip)

    def size(self, parts: Sequence[Part]) -> tuple[int, int]:
        """(h, w) for the images of a row. Raises `BadRow` where one is too small."""
        known = [(part, *size_of(part)) for part in parts]
        frame = (self.resolution, self.resolution)
        if self.step and known:
            mean = sum(math.log(width / height) for _, height, width in known) / len(known)
            frame = min(buckets(self.resolution, self.step), key=lambda f: (abs(math.log(f[1] / f[0]) - mean), -f[0] * f[1], f))
        for part, height, width in known:
            if self.min_size is not None and min(height, width) < self.min_size:
                raise BadRow(f"{name_of(part)}: it has {width} x {height} pixels, and data.min_size is {self.min_size}")
            if self.min_size is None and (height < frame[0] or width < frame[1]):
                raise BadRow(f"{name_of(part)}: it has {width} x {height} pixels, less than the {frame[1]} x {frame[0]} it is used at; "
                             "data.min_size=N lets images with sides of N pixels or more be enlarged")
        return frame


def size_of(part: Part) -> tuple[int, int]:
    """(h, w) of an image after its operations."""
    known = facts(part)
    height, width = known.height, known.width
    for op in part.get("ops", ()):
        if (parsed := parse_op(op))[0] == "crop":
            height, width = _cropped(height, width, *parsed[1])
    return height, width


def count_notes(parts: Sequence[Part], frame: tuple[int, int], counts: Counter[str]) -> None:
    """Adds what had to be done to images to `counts`, in words."""
    for part in parts:
        known, (height, width) = facts(part), size_of(part)
        counts["laid on white (alpha)"] += known.notes == "alpha"
        counts["grey"] += known.notes == "grey"
        counts["enlarged"] += height < frame[0] or width < frame[1]


def prepare(image: Image, resolution: tuple[int, int], flip: bool = False) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Mirrored if asked to, scaled until it covers `resolution` (h, w), and its middle cut out: [3, h, w] fp32 in [-1, 1].

    With it (original h, original w, crop top, crop left), the crop in pixels of the scaled image: what SDXL is told (arXiv 2307.01952).
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    (height, width), original = resolution, (image.height, image.width)
    if flip:
        image = ImageOps.mirror(image)
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    cut = np.array(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(cut / 127.5 - 1.0).permute(2, 0, 1).contiguous(), (*original, top, left)
