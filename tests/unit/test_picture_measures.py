"""Measures of pictures against closed forms, and what blur, noise, colour and collapse do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from prefopt.report import picture_measures as pm


def photos(count: int = 12, seed: int = 0, size: int = 48) -> list[Image.Image]:
    """Random pictures with soft shapes."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), 3) for _ in range(count)]


def of(array) -> Image.Image:
    return Image.fromarray(np.asarray(array).round().clip(0, 255).astype(np.uint8))


def test_the_frechet_distance_of_normal_distributions():
    a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    gap = np.array([1.0, -2.0, 0.0])
    wanted = 5.0 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()  # |gap|^2 is 5; equal axes: each on its own
    assert pm.frechet_of_normals(gap, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(wanted, rel=1e-12)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turned = pm.frechet_of_normals(turn @ gap, turn @ np.diag(a) @ turn.T, np.zeros(3), turn @ np.diag(b) @ turn.T)
    assert turned == pytest.approx(wanted, rel=1e-9)
    low_rank = np.diag([1.0, 0.0, 0.0])  # fewer pictures than features
    assert pm.frechet_of_normals(np.zeros(3), low_rank, np.zeros(3), np.diag(b)) == pytest.approx(9.25, rel=1e-9)
    # Axes that differ: (C_1 C_2)^(1/2) of two 2 x 2 matrices has the trace sqrt(tr + 2 sqrt(det)) of the product.
    c1, c2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 2.0]])
    product = c1 @ c2
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    found = pm.frechet_of_normals(np.zeros(2), c1, np.zeros(2), c2)
    assert found == pytest.approx(np.trace(c1) + np.trace(c2) - 2 * cross, rel=1e-9)


def test_the_frechet_distance_of_samples_comes_near_that_of_their_distributions():
    rng = np.random.default_rng(0)
    a, b = np.array([4.0, 1.0]), np.array([1.0, 9.0])
    first, second = rng.normal(size=(20000, 2)) * np.sqrt(a) + [1, 0], rng.normal(size=(20000, 2)) * np.sqrt(b)
    assert pm.frechet(first, second) == pytest.approx(1 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=0.15)


def test_the_frechet_distance_of_pictures():
    seen = pm.features(photos(40))
    assert pm.frechet(seen, seen) == pytest.approx(0, abs=1e-9)
    assert pm.frechet(seen, seen[::-1]) == pytest.approx(0, abs=1e-9)
    other = pm.frechet(seen, pm.features(photos(40, seed=1)))
    blurred = [pm.frechet(seen, pm.features([p.filter(ImageFilter.GaussianBlur(r)) for p in photos(40)])) for r in (2, 4, 8)]
    brighter = [pm.frechet(seen, pm.features([of(np.asarray(p, float) + shift) for p in photos(40)])) for shift in (30, 60, 90)]
    for distances in (blurred, brighter):
        assert distances == sorted(distances) and distances[0] > 0
        assert distances[-1] > 3 * other, "another draw from the same distribution is nearer than changed pictures"
    assert pm.frechet(seen, seen + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)
    with pytest.raises(ValueError, match="at least two pictures"):
        pm.frechet(seen[:1], seen)


def test_features_are_the_same_on_every_call_and_for_every_batch():
    images = photos(3) + [photos(1, size=80)[0].convert("L")]
    seen = pm.features(images)
    assert seen.shape == (4, 64) and np.isfinite(seen).all()
    pm._kernels.cache_clear()
    assert np.array_equal(seen, pm.features(images))
    assert np.array_equal(seen[2:3], pm.features(images[2:3]))
    assert pm.features(photos(1))[0].sum() == pytest.approx(seen[0].sum())


def test_diversity_is_the_mean_distance_within_prompts():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [9.0, 9.0]])
    found = pm.diversity(points, ["a", "a", "b", "a", "c"])
    assert found == pytest.approx([(5 + 0 + 5) / 3])
    assert pm.diversity(points, list("abcde")).size == 0
    same = pm.features(photos(1) * 3)
    assert pm.diversity(same, ["a"] * 3) == pytest.approx([0])
    assert pm.diversity(pm.features(photos(3)), ["a"] * 3)[0] > 0


def test_saturation_is_known_for_plain_colours():
    colours = [(255, 0, 0), (128, 128, 128), (0, 0, 0), (200, 100, 150)]
    assert pm.saturation([Image.new("RGB", (5, 4), c) for c in colours]) == pytest.approx([1, 0, 0, 0.5])
    strong = pm.saturation([ImageEnhance.Color(p).enhance(1.6) for p in photos()])
    assert (strong > pm.saturation(photos())).all()


def test_high_frequencies_of_waves_noise_and_blur():
    x = np.arange(64)
    waves = [of(np.tile(128 + 100 * np.cos(2 * np.pi * x * k / 64), (64, 1))) for k in (4, 15, 17, 31)]
    assert pm.high_frequency(waves) == pytest.approx([0, 0, 1, 1], abs=0.01)
    assert pm.high_frequency([Image.new("RGB", (9, 7), "green")]) == pytest.approx([0])
    noise = of(np.random.default_rng(0).normal(128, 30, (128, 128)))
    assert pm.high_frequency([noise]) == pytest.approx([1 - math.pi / 16], abs=0.02)  # the circle's share of the square of frequencies
    blurred = pm.high_frequency([noise.filter(ImageFilter.GaussianBlur(r)) for r in (1, 2)])
    assert 1 - math.pi / 16 > blurred[0] > blurred[1]
    assert pm.high_frequency([noise.resize((128, 64), 0)]).shape == (1,)


def test_a_picture_matches_only_as_a_whole():
    parts = [{"count": 1.0, "colour": 0.6}, {"count": 0.0, "colour": 1.0}, {"count": 1.0, "colour": 1.0}, {"count": 1.0, "colour": 0.2}]
    found = pm.prompt_match(parts, ["a", "a", "b", "b"])
    assert found["match/count"] == pytest.approx([0.5, 1]) and found["match/colour"] == pytest.approx([0.8, 0.6])
    assert found["prompt_match"] == pytest.approx([0.65, 0.8])
    assert found["all_parts"] == pytest.approx([0.5, 0.5])
    assert pm.prompt_match(parts, ["a", "a", "a", "b"])["match/colour"].mean() == pytest.approx(0.7), "pictures count alike"


def test_variety_is_the_mean_distance_between_prompts():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert pm.variety(points).mean() == pytest.approx((5 + 5 + 0) / 3)
    rng = np.random.default_rng(0)
    means = [pm.variety(rng.normal(size=(60, 2))) for _ in range(300)]
    claimed = np.mean([values.std(ddof=1) / math.sqrt(60) for values in means])
    assert np.std([values.mean() for values in means]) == pytest.approx(claimed, rel=0.15), "the spread is the sampling error"
    with pytest.raises(ValueError, match="at least two"):
        pm.variety(points[:1])


def test_the_frechet_distance_has_an_interval():
    seen, other = pm.features(photos(30)), pm.features([p.filter(ImageFilter.GaussianBlur(3)) for p in photos(30)])
    value, low, high = pm.frechet_interval(seen, other)
    assert value == pm.frechet(seen, other) and 0 < low < value < high and value - low == pytest.approx(high - value)
    assert pm.frechet_interval(seen, seen) == pytest.approx((0, 0, 0), abs=1e-9)


def test_all_measures_are_one_number_per_prompt():
    images = photos(6)
    found = pm.measures(images)
    assert {name: len(values) for name, values in found.items()} == {"saturation": 6, "high_frequency": 6, "variety": 6}
    assert found["saturation"].mean() == pytest.approx(pm.saturation(images).mean())
    assert "variety" not in pm.measures(images[:1])
