"""A small world of captioned pictures with a known reward: shapes on a light background, drawn by code.

A caption asks for a count, a colour, a shape and a place: "two red circles on the left". A picture of `SIZE` pixels shows that, or slips in
some of it, on a background that is warm or cold and evenly or unevenly lit. What a picture is worth under a caption is computed from its
pixels alone by `true_reward`, so that reward and prompt match of a trained model's samples are measured, not judged.

Every row is drawn from (seed, split, index) alone: row i is the same however many rows are asked for, and `label_noise` can change only
which of its two pictures is the chosen one. Pictures are PNG files in the cache folder, named after their content.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.tiny_feedback import reversed_scores
from prefopt.errors import UserError, nearest
from prefopt.paths import cache_dir

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 32  # pixels, height and width
SPLITS = ("train", "eval")
COUNTS = ("one", "two", "three")
COLOURS = {
    "red": (214, 36, 36),
    "yellow": (246, 204, 0),
    "green": (34, 150, 60),
    "blue": (36, 84, 216),
    "purple": (150, 40, 176),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}

_COLD, _WARM = np.array([196.0, 216.0, 240.0]), np.array([250.0, 222.0, 184.0])
_BRIGHTNESS = 0.92  # leaves room for the lit side of an uneven background
_TILT = 0.16  # how far the two edges of the most uneven background are from its middle, relative to it
# Half the side of a shape by how many there are, and how far apart their centres are, in pixels.
_HALF = {1: (5.5, 7.0), 2: (4.4, 5.4), 3: (3.7, 4.3)}
_APART = {1: 0.0, 2: 14.0, 3: 10.5}
# How often a drawn picture slips in its count, its colour, its shape or its place.
_SLIP = 0.08

# `true_reward`: what each part can add or take, in nats.
_PART, _LOOK, _MESS = 1.0, 2.0, 2.0
HIGHEST_REWARD, LOWEST_REWARD = 4 * _PART + _LOOK, -4 * _PART - _LOOK - _MESS


@dataclass(frozen=True)
class Asked:
    """What a caption asks for."""

    count: int  # 1 to 3
    colour: str
    shape: str
    place: str


# --- captions ---


def caption(asked: Asked) -> str:
    """The sentence that asks for it."""
    plural = "" if asked.count == 1 else "es" if asked.shape == "cross" else "s"
    return f"{COUNTS[asked.count - 1]} {asked.colour} {asked.shape}{plural} {PLACES[asked.place]}"


@cache
def _by_caption() -> dict[str, Asked]:
    cells = itertools.product(range(1, len(COUNTS) + 1), COLOURS, SHAPES, PLACES)
    return {caption(asked): asked for asked in itertools.starmap(Asked, cells)}


def asked_by(text: str) -> Asked:
    """What a caption of the world asks for; case, spacing and a full stop do not matter. Raises UserError for any other text."""
    asked = _by_caption().get(" ".join(text.lower().replace(".", " ").split()))
    if asked is None:
        raise UserError(
            f"tiny_pictures' true reward knows captions such as {caption(Asked(2, 'red', 'circle', 'left'))!r}, not {text[:80]!r}; "
            "use it with data=tiny_pictures."
        )
    return asked


def captions(split: str) -> list[str]:
    """All captions of a split, in a fixed order: 216 for "train", 72 for "eval", none in both.

    A quarter of the combinations of colour, shape and place is held out; every word occurs in both splits.
    """
    _check_rows(split, 1, 0)
    return [text for text, asked in _by_caption().items() if _held_out(asked) == (split == "eval")]


def _held_out(asked: Asked) -> bool:
    return (list(COLOURS).index(asked.colour) + SHAPES.index(asked.shape) + list(PLACES).index(asked.place)) % 4 == 0


def vocabulary() -> list[str]:
    """Every word of the captions, sorted."""
    return sorted({word for text in _by_caption() for word in text.split()})


# --- drawing ---


def _covered(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points belong to a shape that is centred at 0 and reaches from -1 to 1; y grows downwards."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "triangle":
        return (abs(x) <= (y + 1) / 1.9) & (y <= 0.9)
    return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)


def _coverage(shape: str, x: float, y: float, half: float, fine: int = 4) -> np.ndarray:
    """How much of each pixel [SIZE, SIZE] a shape of half side `half` centred at (x, y) covers, 0 to 1."""
    rows, columns = (slice(max(0, int(c - half)), min(SIZE, int(c + half) + 1)) for c in (y, x))
    at_y, at_x = ((np.arange(s.start * fine, s.stop * fine) + 0.5) / fine for s in (rows, columns))
    inside = _covered(shape, (at_x[None] - x) / half, (at_y[:, None] - y) / half)
    coverage = np.zeros((SIZE, SIZE))
    size = (rows.stop - rows.start, columns.stop - columns.start)
    coverage[rows, columns] = inside.reshape(size[0], fine, size[1], fine).mean((1, 3))
    return coverage


def draw(asked: Asked, rng: random.Random, warmth: float, tilt: float) -> np.ndarray:
    """A picture [SIZE, SIZE, 3] uint8 that shows exactly what is asked for; `rng` moves and scales the shapes a little.

    `warmth` -1 (bluish) to 1 (cream), `tilt` -1 (lit from the left) to 1 (from the right), 0 evenly lit.
    """
    middle = SIZE / 2
    level = 1 + _TILT * tilt * ((np.arange(SIZE) + 0.5) / middle - 1)
    ground = _BRIGHTNESS * (_COLD + (_WARM - _COLD) * (warmth + 1) / 2)
    pixels = np.broadcast_to(np.minimum(level[None, :, None] * ground, 255.0), (SIZE, SIZE, 3))
    half = rng.uniform(*_HALF[asked.count])
    # Across: into the asked half of the picture. Along: the shapes stand in a row, one shape anywhere between the edges.
    across = middle / 2 + rng.uniform(-1.0, 1.0) * max(0.0, middle / 2 - half - 0.5)
    if asked.place in ("right", "bottom"):
        across = SIZE - across
    slack = middle - half - 1 - _APART[asked.count] * (asked.count - 1) / 2
    start = middle + rng.uniform(-1.0, 1.0) * max(0.0, slack)
    for number in range(asked.count):
        along = start + _APART[asked.count] * (number - (asked.count - 1) / 2)
        x, y = (across, along) if asked.place in ("left", "right") else (along, across)
        covered = _coverage(asked.shape, x, y, half)[:, :, None]
        pixels = pixels * (1 - covered) + covered * np.array(COLOURS[asked.colour], dtype=float)
    return np.rint(pixels).astype(np.uint8)


def _picture(asked: Asked, rng: random.Random) -> np.ndarray:
    """A picture of any quality: each of count, colour, shape and place is now and then another one; any warmth, any light."""

    def slip(value, values):
        return rng.choice([v for v in values if v != value]) if rng.random() < _SLIP else value

    shown = Asked(
        slip(asked.count, range(1, len(COUNTS) + 1)), slip(asked.colour, COLOURS), slip(asked.shape, SHAPES), slip(asked.place, PLACES)
    )
    return draw(shown, rng, warmth=rng.uniform(-1.0, 1.0), tilt=rng.uniform(-1.0, 1.0))


# --- judging ---

_STEPS = (np.arange(SIZE) + 0.5) / SIZE - 0.5
_PLANE = np.stack([np.ones((SIZE, SIZE)), *np.meshgrid(_STEPS, _STEPS)], -1).reshape(-1, 3)
_PALETTE = np.array(list(COLOURS.values()), dtype=float)

@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of half side 1, and how far its centre of mass lies below its centre."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, 401),) * 2, indexing="ij")
    covered = _covered(shape, x, y)
    return 4 * covered.mean(), float(y[covered].mean())


def _background(pixels: np.ndarray) -> np.ndarray:
    """The background [SIZE, SIZE, 3]: a plane through the pixels that are near it, found by starting at the commonest level."""
    flat = pixels.reshape(-1, 3)
    plane = np.broadcast_to(np.median(flat, 0), flat.shape)
    for reach in (60.0, 40.0, 25.0):
        near = ((flat - plane) ** 2).sum(1) < reach**2
        design = _PLANE[near]
        if len(design) < 2 * SIZE:
            break
        plane = _PLANE @ np.linalg.solve(design.T @ design + 1e-6 * np.eye(3), design.T @ flat[near])
    return plane.reshape(pixels.shape)


def _opacity(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as a mixture of background and one colour: the colour's share and the distance to that mixture, both [colours, H, W]."""
    direction, offset = _PALETTE[:, None, None, :] - ground, pixels - ground
    share = np.einsum("hwc,khwc->khw", offset, direction) / np.maximum(np.einsum("khwc,khwc->khw", direction, direction), 1.0)
    share = share.clip(0.0, 1.15)
    return share, np.sqrt(((offset - share[..., None] * direction) ** 2).sum(-1))


def _blobs(mask: np.ndarray) -> list[np.ndarray]:
    """The connected regions (over edges) of a mask [SIZE, SIZE], as masks, without those of fewer than 8 pixels."""
    # The mask as one number, a bit for each pixel and an empty one behind each row: regions grow by shifts.
    width = SIZE + 1
    rest, found = int.from_bytes(np.packbits(np.pad(mask, ((0, 0), (0, 1)))).tobytes(), "big"), []
    while rest:
        grown, region = rest & -rest, 0
        while grown != region:
            region = grown
            grown = (region | region << 1 | region >> 1 | region << width | region >> width) & rest
        rest ^= region
        if region.bit_count() >= 8:
            bits = np.frombuffer(region.to_bytes(SIZE * width // 8, "big"), np.uint8)
            found.append(np.unpackbits(bits).reshape(SIZE, width)[:, :SIZE].astype(bool))
    return found


def _touched(mask: np.ndarray) -> np.ndarray:
    """A mask and its neighbours over edges; beyond the picture's border there is nothing."""
    wide = np.pad(mask, 1)
    return wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:] | mask


def _solid(opacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the opacity of pale or patchy things as if they were painted in full, how strong each is); what is opaque stays as it is. A person
    sees a washed-out triangle as a triangle of a weak colour, and not as splinters."""
    solid, strength = opacity.copy(), np.ones_like(opacity)
    for blob in _blobs(opacity > 0.2):
        strength[blob] = np.quantile(opacity[blob], 0.8)
        solid[blob] = (opacity[blob] / max(strength[blob][0], 0.45)).clip(max=1.0)
    for blob in _blobs(solid > 0.35):
        solid[~_touched(~blob)] = 1.0  # what it surrounds on four sides
    return solid, strength


def _shape_fit(opacity: np.ndarray) -> dict[str, float]:
    """How well each shape explains one blob's opacity, 0 to 1: a soft choice between the shapes of the blob's area and centre of mass."""
    opacity = (1.6 * (opacity - 0.5) + 0.5).clip(0.0, 1.0)  # a blurred shape is still that shape
    area = opacity.sum()
    y, x = ((opacity.sum(axis) * (np.arange(SIZE) + 0.5)).sum() / area for axis in (1, 0))
    overlap = {}
    for shape in SHAPES:
        unit, below = _moments(shape)
        half = math.sqrt(area / unit)
        template = _coverage(shape, x, y - below * half, half)
        overlap[shape] = float(np.minimum(template, opacity).sum() / np.maximum(template, opacity).sum())
    best = max(overlap.values())
    chances = {shape: math.exp(30.0 * (value - best)) for shape, value in overlap.items()}
    # What looks like none of the shapes is none: a stripe overlaps with its best template by about a half.
    looks = min(1.0, max(0.0, (best - 0.55) / 0.2))
    return {shape: looks * chance / sum(chances.values()) for shape, chance in chances.items()}


def _side(place: str, blob: np.ndarray) -> float:
    """Whether a blob lies in the asked half: 1, or less where its centre is near the middle of the picture, 0 from the middle on."""
    y, x = np.argwhere(blob).mean(0) + 0.5
    inside = {"left": SIZE / 2 - x, "right": x - SIZE / 2, "top": SIZE / 2 - y, "bottom": y - SIZE / 2}[place]
    return min(1.0, max(0.0, float(inside) / (SIZE / 8)))


def measures(caption: str, image: Image) -> dict[str, float]:
    """What `true_reward` sees in a picture, each from 0 (not at all) to 1 unless said otherwise.

    - `count`, `colour`, `shape`, `place`: how far each is as asked for, of things that look like shapes; `prompt_match` is their mean. The
      paler a shape is, the less colour it has; count, shape and place are seen as long as it is legible
    - `warmth`, -1 (as bluish as backgrounds are drawn) to 1 (as cream); `symmetry`: 1 where the background is as light on the left as on
      the right; `aesthetic`, -1 to 1: 0.6 warmth + 0.4 (2 symmetry - 1)
    - `mess`: how much of the picture is neither background nor one of the counted shapes

    A picture of another size is scaled first. Raises UserError for a caption that is not of this world.
    """
    asked = asked_by(caption)
    image = image.convert("RGB")
    pixels = np.asarray(image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), 4), dtype=float)  # 4: box filter
    ground = _background(pixels)
    shares, off = _opacity(pixels, ground)
    unexplained = off.min(0)
    opacity, strength = _solid(np.take_along_axis(shares, off.argmin(0)[None], 0)[0].clip(max=1.0))
    # Blurred edges can join or lose shapes: they are counted at three heights.
    at_heights = [_blobs(opacity > height) for height in (0.35, 0.5, 0.65)]
    blobs = at_heights[1]
    parts = dict.fromkeys(("count", "colour", "shape", "place"), 0.0)
    own = np.zeros_like(opacity)
    for blob in blobs:
        alone = np.where(_touched(blob), opacity, 0.0)
        own = np.maximum(own, alone)
        wrong = (off[:, blob] ** 2).mean(1) / (2 * 30.0**2)  # a chance for each colour, pixels scattered by 30 of 255 around it
        chances = np.exp(wrong.min() - wrong)
        fits = _shape_fit(alone)
        looks = sum(fits.values()) / len(blobs)  # what looks like no shape at all has no colour and no place either, and does not count
        parts["count"] += looks * sum(len(found) == asked.count for found in at_heights) / len(at_heights)
        strong = min(1.0, float(strength[blob].mean()) / 0.8)
        parts["colour"] += looks * strong * float(chances[list(COLOURS).index(asked.colour)] / chances.sum())
        parts["shape"] += fits[asked.shape] / len(blobs)
        parts["place"] += looks * _side(asked.place, blob)
    stray = np.where(opacity > 0.15, opacity - own, 0.0)
    mess = min(1.0, float((unexplained / 100.0 + stray).clip(max=1.0).mean()) / 0.3)

    red, green, blue = ground.mean((0, 1))
    cold, warm = (float(c[0] - c[2]) / c.sum() for c in (_COLD, _WARM))
    warmth = ((red - blue) / max(1.0, red + green + blue) - cold) / (warm - cold) * 2 - 1
    light = ground.sum(-1).mean(0)
    symmetry = 1 - min(1.0, float(abs(light[-1] - light[0]) / max(1.0, light.sum() / SIZE)) / (2 * _TILT))
    warmth = min(1.0, max(-1.0, float(warmth)))
    return {
        "prompt_match": sum(parts.values()) / 4,
        **parts,
        "aesthetic": 0.6 * warmth + 0.4 * (2 * symmetry - 1),
        "warmth": warmth,
        "symmetry": symmetry,
        "mess": mess,
    }


def true_reward(caption: str, image: Image) -> float:
    """What a picture is worth under a caption, in Bradley-Terry nats, between `LOWEST_REWARD` and `HIGHEST_REWARD`; see `measures`.

    (2 count - 1) + (2 colour - 1) + (2 shape - 1) + (2 place - 1) + 2 aesthetic - 2 mess, the aesthetic counted in full only where the
    picture shows something: a good look without any shape earns nothing. Computed from the pixels alone; any picture is accepted.
    """
    seen = measures(caption, image)
    look = seen["aesthetic"]
    if look > 0:
        look *= min(1.0, 2 * seen["prompt_match"])
    return _PART * (8 * seen["prompt_match"] - 4) + _LOOK * look - _MESS * seen["mess"]


# --- rows ---


@lru_cache(maxsize=8)
def _shuffled(split: str, seed: int, round_: int) -> tuple[str, ...]:
    """All captions of a split in the order of one pass through them."""
    texts = captions(split)
    random.Random(f"tiny_pictures/order/{seed}/{split}/{round_}").shuffle(texts)
    return tuple(texts)


def _caption(split: str, seed: int, index: int) -> str:
    size = len(_shuffled(split, seed, 0))
    return _shuffled(split, seed, index // size)[index % size]


def _check_rows(split: str, count: int, seed: int) -> None:
    if split not in SPLITS:
        raise UserError(f"data.split {split!r} is not a split of tiny_pictures{nearest(str(split), SPLITS)}.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"data.count is {count!r}; give a whole number of rows, 1 or more.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"data.seed is {seed!r}; give a whole number.")


def stored(pixels: np.ndarray) -> Path:
    """The PNG file of a picture [H, W, 3] uint8 in the cache folder, named after its bytes; written where it is missing or damaged."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    content = buffer.getvalue()
    name = hashlib.sha256(content).hexdigest()[:32]
    path = cache_dir() / "tiny-pictures" / name[:2] / f"{name}.png"
    try:
        if path.read_bytes() == content:
            return path
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".part", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files, which a shared cache cannot use
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def rows(split: str, count: int, seed: int = 0, label_noise: float = 0.0, completions: int = 2) -> Iterator[dict[str, object]]:
    """Preference pairs: the caption as `prompt`, `chosen` and `rejected` pictures as chat messages, and the two pictures' true rewards.

    The label is one draw from Bradley-Terry on `true_reward`, flipped with probability `label_noise`. With more than two `completions` a
    row is a ranking: that many pictures and their `scores`, their true rewards, given out in the opposite order with that probability.
    Raises UserError at the call, not at the first row.
    """
    _check_rows(split, count, seed)
    number = isinstance(label_noise, (int, float)) and not isinstance(label_noise, bool)
    if not number or not 0 <= label_noise <= 0.5:
        raise UserError(f"data.label_noise is {label_noise!r}; give a number from 0 to 0.5.")
    if completions > 2:
        return (_ranking(split, seed, index, completions, label_noise) for index in range(count))
    return (_pair(split, seed, index, label_noise) for index in range(count))


def _prompt(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def _shown(pixels: np.ndarray) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": [{"type": "image", "path": str(stored(pixels))}]}]


def _judged(text: str, rng: random.Random) -> tuple[np.ndarray, float]:
    """A picture of any quality for a caption, and its true reward."""
    from PIL import Image

    pixels = _picture(asked_by(text), rng)
    return pixels, true_reward(text, Image.fromarray(pixels))


def _pair(split: str, seed: int, index: int, label_noise: float) -> dict[str, object]:
    rng = random.Random(f"tiny_pictures/pair/{seed}/{split}/{index}")
    text = _caption(split, seed, index)
    (first, first_reward), (second, second_reward) = _judged(text, rng), _judged(text, rng)
    # Both are drawn whatever the settings are: a noisy set is the clean one with some labels flipped.
    label_draw, flip_draw = rng.random(), rng.random()
    first_wins = label_draw < 1.0 / (1.0 + math.exp(second_reward - first_reward))
    if flip_draw < label_noise:
        first_wins = not first_wins
    sides = [(first, first_reward), (second, second_reward)]
    (chosen, chosen_reward), (rejected, rejected_reward) = sides if first_wins else reversed(sides)
    return {
        "prompt": _prompt(text),
        "chosen": _shown(chosen),
        "rejected": _shown(rejected),
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
    }


def _ranking(split: str, seed: int, index: int, count: int, label_noise: float) -> dict[str, object]:
    rng = random.Random(f"tiny_pictures/ranking/{seed}/{split}/{index}")
    text = _caption(split, seed, index)
    judged = [_judged(text, rng) for _ in range(count)]
    scores = dict(enumerate(reward for _, reward in judged))  # by the picture's number
    if rng.random() < label_noise:
        scores = reversed_scores(scores)
    return {"prompt": _prompt(text), "completions": [_shown(pixels) for pixels, _ in judged], "scores": list(scores.values())}


def pretraining_pictures(count: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Train captions, each with one picture [SIZE, SIZE, 3] uint8 of any quality."""
    _check_rows("train", count, seed)
    for index in range(count):
        text = _caption("train", seed, index)
        yield text, _picture(asked_by(text), random.Random(f"tiny_pictures/pretraining/{seed}/{index}"))
