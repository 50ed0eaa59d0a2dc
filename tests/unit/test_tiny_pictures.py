"""The tiny_pictures world: what is drawn, what its pixels are worth, and the rows made of it."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from prefopt.data import tiny_pictures as world
from prefopt.data.tiny_pictures import Asked
from prefopt.errors import UserError

CAPTION = "two red circles on the left"
PINNED = ("three yellow squares at the top", [589778, 585479])  # caption, sum of the chosen and of the rejected pixels
ASKED = Asked(2, "red", "circle", "left")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


def drawn(warmth: float = 1.0, tilt: float = 0.0, seed: int = 0, **changed: object) -> Image.Image:
    """A picture of ASKED, or of something else in parts."""
    asked = Asked(**{**vars(ASKED), **changed})
    return Image.fromarray(world.draw(asked, random.Random(seed), warmth, tilt))


def reward(image: Image.Image) -> float:
    return world.true_reward(CAPTION, image)


def of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.broadcast_to(pixels, (world.SIZE, world.SIZE, 3)).astype(np.uint8))


def path_of(side: list[dict]) -> str:
    (message,) = side
    (part,) = message["content"]
    assert message["role"] == "assistant" and part["type"] == "image"
    return part["path"]


def text_of(row: dict) -> str:
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"][0]["text"]


# --- captions ---


def test_captions_of_the_splits_are_disjoint_and_cover_every_word():
    train, held_out = world.captions("train"), world.captions("eval")
    assert (len(set(train)), len(set(held_out))) == (216, 72) and not set(train) & set(held_out)
    words = set(world.vocabulary())
    for split in (train, held_out):
        assert {word for text in split for word in text.split()} == words
    shown = [{(a.colour, a.shape, a.place) for a in map(world.asked_by, split)} for split in (train, held_out)]
    assert not shown[0] & shown[1], "a held-out combination is not trained with another count"


def test_a_caption_says_what_it_was_made_of():
    for cell in itertools.product((1, 2, 3), world.COLOURS, world.SHAPES, world.PLACES):
        assert world.asked_by(world.caption(Asked(*cell))) == Asked(*cell)
    assert world.asked_by(" Two RED circles  on the left. ") == ASKED
    for other in ("", "two red circle on the left", "a fox", CAPTION + " please"):
        with pytest.raises(UserError, match="tiny_pictures"):
            world.true_reward(other, drawn())


# --- the reward ---


@pytest.mark.parametrize("place", world.PLACES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_was_drawn_is_seen(count, place):
    for number, (colour, shape) in enumerate(itertools.product(world.COLOURS, world.SHAPES)):
        asked = Asked(count, colour, shape, place)
        warmth, tilt = ((1, 0), (-1, 0.8), (0, -1))[number % 3]
        seen = world.measures(world.caption(asked), Image.fromarray(world.draw(asked, random.Random(number), warmth, tilt)))
        assert min(seen["count"], seen["colour"], seen["shape"], seen["place"]) > 0.8 and seen["mess"] < 0.05, (asked, seen)
        assert seen["warmth"] == pytest.approx(warmth, abs=0.05)
        assert seen["symmetry"] == pytest.approx(1 - abs(tilt), abs=0.05)


@pytest.mark.parametrize(
    ("part", "others"),
    [
        ("count", [1, 3]),
        ("colour", [c for c in world.COLOURS if c != "red"]),
        ("shape", [s for s in world.SHAPES if s != "circle"]),
        ("place", ["right"]),
    ],
)
def test_a_part_that_is_wrong_costs_its_two_nats(part, others):
    right = reward(drawn())
    assert right == pytest.approx(world.HIGHEST_REWARD, abs=0.15)
    for other, seed in itertools.product(others, range(3)):
        image = drawn(seed=seed, **{part: other})
        seen = world.measures(CAPTION, image)
        assert seen[part] < 0.15 and seen["prompt_match"] == pytest.approx(0.75, abs=0.06)
        assert right - reward(image) == pytest.approx(2.0, abs=0.45)


def test_the_rest_is_the_look():
    warm, cold, uneven = reward(drawn()), reward(drawn(warmth=-1.0)), reward(drawn(tilt=1.0))
    assert warm - cold == pytest.approx(2.4, abs=0.1) and warm - uneven == pytest.approx(1.6, abs=0.1)
    assert reward(drawn(warmth=0.5)) > reward(drawn(warmth=0.0)) > reward(drawn(warmth=-0.5))
    assert reward(drawn(tilt=0.2)) > reward(drawn(tilt=-0.6)) > reward(drawn(tilt=0.9))
    assert reward(drawn(tilt=0.5)) == pytest.approx(reward(drawn(tilt=-0.5)), abs=0.15)


def test_a_blurred_or_grainy_picture_is_worth_a_little_less():
    grain = np.random.default_rng(0).normal(0, 1, (world.SIZE, world.SIZE, 3))
    blurred = [reward(drawn().filter(ImageFilter.GaussianBlur(radius))) for radius in (0.0, 0.8, 1.6, 4.0)]
    grainy = [reward(of((np.asarray(drawn(), float) + level * grain).clip(0, 255))) for level in (0, 8, 16, 60)]
    for values in (blurred, grainy):
        assert values == sorted(values, reverse=True)
        assert values[0] - values[1] < 0.8, "still legible"
        assert values[0] - values[3] > 2.5
    assert reward(drawn().resize((96, 96), Image.Resampling.BICUBIC)) == pytest.approx(reward(drawn()), abs=0.3)


@pytest.mark.parametrize(
    "asked", [Asked(2, "red", "circle", "left"), Asked(3, "purple", "cross", "top"), Asked(1, "yellow", "triangle", "right")]
)
def test_a_pale_picture_loses_colour_and_nothing_else_as_long_as_it_is_legible(asked):
    full = world.draw(asked, random.Random(3), 1, 0).astype(float)
    ground, strengths = world._background(full), (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.15)
    seen = [world.measures(world.caption(asked), of(ground + strength * (full - ground))) for strength in strengths]
    for measured in seen[:-1]:
        assert min(measured["count"], measured["shape"], measured["place"]) > 0.9
    colours = [measured["colour"] for measured in seen]
    assert colours == sorted(colours, reverse=True) and colours[1] > 0.9 and 0.3 < colours[3] < 0.6 and colours[5] < 0.2
    assert seen[-1]["prompt_match"] == 0


def test_a_pale_stripe_does_not_break_a_shape_in_two():
    asked = Asked(1, "red", "square", "left")
    full = world.draw(asked, random.Random(0), 1, 0).astype(float)
    painted = full - world._background(full)
    middle = int(np.argwhere(np.abs(painted).sum(-1) > 150).mean(0)[0])
    striped = full.copy()
    striped[middle : middle + 2] -= 0.6 * painted[middle : middle + 2]
    whole, broken = (world.measures(world.caption(asked), of(pixels)) for pixels in (full, striped))
    assert whole["prompt_match"] > 0.95 and broken["prompt_match"] == pytest.approx(whole["prompt_match"], abs=0.06)


def tricks() -> dict[str, Callable[[], Image.Image]]:
    """Pictures that show nothing of what CAPTION asks for, however much red there is in them."""
    rng = np.random.default_rng(0)
    size, red, cream = world.SIZE, np.array(world.COLOURS["red"]), np.array([250, 222, 184])
    left = (np.arange(size) < size // 2)[None, :, None]
    checks = ((np.arange(size)[:, None] // 2 + np.arange(size)[None] // 2) % 2 == 0)[..., None]
    dots = np.zeros((size, size, 1), bool)
    dots[4::6, 2:14:6] = True
    return {
        "cream": lambda: of(cream),
        "white": lambda: of(np.array([255, 255, 255])),
        "black": lambda: of(np.zeros(3)),
        "red": lambda: of(red),
        "half red": lambda: of(np.where(left, red, cream)),
        "checks": lambda: of(np.where(checks, red, cream)),
        "red dots": lambda: of(np.where(dots, red, cream)),
        "noise": lambda: of(rng.integers(0, 256, (size, size, 3))),
        "red noise": lambda: of(np.where(rng.random((size, size, 1)) < 0.3, red, cream)),
        "ramp": lambda: of(np.linspace(red, cream, size)[None]),
        "all colours": lambda: of(np.repeat(np.array([*world.COLOURS.values(), cream, cream]), size // 8, 0)[None]),
    }


@pytest.mark.parametrize("trick", sorted(tricks()))
def test_trivial_pictures_are_worth_less_than_any_honest_try(trick):
    honest = min(reward(drawn(warmth=-1.0, tilt=1.0, count=3)), reward(drawn(warmth=-1.0, tilt=1.0, colour="blue")))
    value = reward(tricks()[trick]())
    assert value < honest and math.isfinite(value)
    assert world.LOWEST_REWARD <= value < 0.0


def test_any_picture_and_mode_is_accepted():
    for image in (Image.new("L", (1, 1)), Image.new("RGBA", (7, 90)), Image.new("1", (32, 32)), drawn().convert("P")):
        assert world.LOWEST_REWARD <= reward(image) <= world.HIGHEST_REWARD


# --- rows ---


def test_rows_are_deterministic_and_do_not_depend_on_how_many_are_asked_for():
    few, many = list(world.rows("train", 5, seed=3)), list(world.rows("train", 40, seed=3))
    assert few == many[:5] and few != list(world.rows("train", 5, seed=4))
    texts = [text for text, _ in world.pretraining_pictures(216)]
    assert sorted(texts) == sorted(world.captions("train")), "one pass holds every caption once"
    assert {text_of(row) for row in world.rows("eval", 72)} == set(world.captions("eval"))


def test_a_row_is_pinned_so_that_two_machines_agree():
    row = next(world.rows("eval", 1))
    assert text_of(row) == PINNED[0]
    assert [np.asarray(Image.open(path_of(row[side]))).astype(int).sum() for side in ("chosen", "rejected")] == PINNED[1]


def test_rewards_of_a_row_are_those_of_its_files():
    for row in world.rows("train", 12):
        for side in ("chosen", "rejected"):
            with Image.open(path_of(row[side])) as image:
                assert image.size == (world.SIZE, world.SIZE)
                assert world.true_reward(text_of(row), image) == row[f"{side}_reward"]


def test_labels_follow_the_reward_and_noise_flips_its_share():
    clean, noisy = (list(world.rows("train", 400, label_noise=noise)) for noise in (0.0, 0.25))
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in clean]
    wins = statistics.mean(gap > 0 for gap in gaps)
    expected = statistics.mean(1 / (1 + math.exp(-abs(gap))) for gap in gaps)
    assert wins == pytest.approx(expected, abs=0.06) and wins > 0.7
    flipped = [a["chosen"] == b["rejected"] for a, b in zip(clean, noisy, strict=True)]
    assert all(a["chosen"] in (b["chosen"], b["rejected"]) for a, b in zip(clean, noisy, strict=True))
    assert statistics.mean(flipped) == pytest.approx(0.25, abs=0.07)


def test_rows_of_more_pictures_are_rankings():
    for row in world.rows("train", 6, completions=4):
        assert len(row["completions"]) == len(row["scores"]) == 4 and len(set(map(path_of, row["completions"]))) == 4
        with Image.open(path_of(row["completions"][2])) as image:
            assert world.true_reward(text_of(row), image) == row["scores"][2]
    clean, noisy = (list(world.rows("train", 30, completions=3, label_noise=noise)) for noise in (0.0, 0.5))
    assert [row["completions"] for row in clean] == [row["completions"] for row in noisy]
    turned = [b for a, b in zip(clean, noisy, strict=True) if a["scores"] != b["scores"]]
    assert 5 < len(turned) < 25 and all(sorted(a["scores"]) == sorted(b["scores"]) for a, b in zip(clean, noisy, strict=True))


def test_pictures_have_every_flaw_and_leave_much_to_gain():
    judged = [world.measures(text, Image.fromarray(pixels)) for text, pixels in world.pretraining_pictures(216)]
    for part in ("count", "colour", "shape", "place"):
        assert 0.02 < statistics.mean(seen[part] < 0.5 for seen in judged) < 0.2
    assert abs(statistics.mean(seen["warmth"] for seen in judged)) < 0.15
    assert statistics.mean(world.true_reward(t, Image.fromarray(p)) for t, p in world.pretraining_pictures(216)) < world.HIGHEST_REWARD - 2


def test_a_damaged_file_is_written_anew_and_others_are_left_alone(tmp_path):
    first = next(world.rows("train", 1))
    path, other = (world.Path(path_of(first[side])) for side in ("chosen", "rejected"))
    content, stamp = path.read_bytes(), other.stat().st_mtime_ns
    path.write_bytes(content[:100])
    assert next(world.rows("train", 1)) == first
    assert path.read_bytes() == content and other.stat().st_mtime_ns == stamp
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"split": "test", "count": 1}, "data.split"),
        ({"split": "train", "count": 0}, "data.count"),
        ({"split": "train", "count": 2.5}, "data.count"),
        ({"split": "train", "count": 1, "seed": "x"}, "data.seed"),
        ({"split": "train", "count": 1, "label_noise": 0.6}, "data.label_noise"),
        ({"split": "train", "count": 1, "label_noise": math.nan}, "data.label_noise"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call_by_their_key(arguments, key):
    with pytest.raises(UserError, match=key):
        world.rows(**arguments)
