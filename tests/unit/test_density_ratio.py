"""BCO's density ratio: rows of bad replies are weighed so that their prompts are those of the good ones."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from prefopt.data.density_ratio import bags_of_words, clipped_ratio, log_density_ratios
from prefopt.data.records import Example, parse_row
from prefopt.data.transforms import Tools
from tests.toy import COLUMNS
from tests.unit.test_transforms import own_store, refused, run  # noqa: F401 (a fixture)

WORDS = ("alpha", "beta", "gamma")


def row(prompt: str, desirable: bool, **columns) -> Example:
    return parse_row({"prompt": prompt, "completion": "yes", "label": desirable, **columns}, COLUMNS, f"row about {prompt}")


def drawn(counts: dict[bool, tuple[int, int, int]]) -> list[Example]:
    """So many prompts of each of WORDS among the desirable and the undesirable rows, in a random order."""
    rows = [row(f"tell me of {word} number {i % 5}", good) for good, many in counts.items() for word, n in zip(WORDS, many, strict=True)
            for i in range(n)]
    random.Random(0).shuffle(rows)
    return rows


def mass(rows: list[Example], desirable: bool) -> list[float]:
    """Share of the weight of one kind of rows that each of WORDS has."""
    found = Counter()
    for e in rows:
        if e.completions[0].desirable == desirable:
            found[next(w for w in WORDS if w in e.prompt_text)] += e.weight
    return [found[word] / sum(found.values()) for word in WORDS]


def test_weighted_prompts_of_bad_replies_are_those_of_good_ones():
    rows = drawn({True: (200, 200, 200), False: (500, 200, 100)})
    made = run(rows, {"density_ratio": {}}).examples
    far, near = (max(abs(a - b) for a, b in zip(mass(r, False), mass(r, True), strict=True)) for r in (rows, made))
    assert far > 0.25 and near < 0.03
    assert all(e.weight == 1 for e in made if e.completions[0].desirable), "good replies keep their weight"
    weights = {word: next(e.weight for e in made if not e.completions[0].desirable and word in e.prompt_text) for word in WORDS}
    assert weights["alpha"] == pytest.approx(200 / 600 / (500 / 800), rel=0.1) and weights["gamma"] == pytest.approx(8 / 3, rel=0.15)


def test_equal_prompts_weigh_what_they_weighed():
    made = run(drawn({True: (60, 30, 30), False: (60, 30, 30)}), {"density_ratio": {}}).examples
    assert [e.weight for e in made] == pytest.approx([1] * len(made), abs=1e-6)
    many = run(drawn({True: (60, 30, 30), False: (20, 10, 10)}), {"density_ratio": {}}).examples
    assert [e.weight for e in many] == pytest.approx([1] * len(many), abs=0.1), "how many rows a kind has does not count"


def test_weights_stay_within_their_bounds_and_multiply_the_row_s():
    rows = drawn({True: (300, 0, 0), False: (30, 300, 0)})
    made = run(rows, {"density_ratio": {"clip": [0.8, 1.25]}})
    assert sorted({e.weight for e in made.examples}) == pytest.approx([0.8, 1, 1.25])
    assert made.transforms[0]["changed"] == {"undesirable rows that weigh less": 300, "undesirable rows that weigh more": 30}
    for e in rows:
        e.weight = 0.5
    halves = run(rows, {"density_ratio": {"clip": [0.8, 1.25]}}).examples
    assert [e.weight for e in halves] == pytest.approx([0.5 * e.weight for e in made.examples])
    assert clipped_ratio(1e6, 0.5, 10) == pytest.approx(10) and clipped_ratio(-1e6, 0.5, 10) == pytest.approx(0.5)


def test_a_sample_of_the_rows_is_enough():
    rows = drawn({True: (200, 200, 200), False: (500, 200, 100)})
    few, again, other = (run(rows, {"density_ratio": {"sample": 150}}, seed=seed).examples for seed in (0, 0, 1))
    assert max(abs(a - b) for a, b in zip(mass(few, False), mass(rows, True), strict=True)) < 0.12
    assert [e.weight for e in few] == [e.weight for e in again] != [e.weight for e in other], "it follows from the seed"


def test_the_classifier_is_at_its_minimum():
    """The gradient of its objective, written out, is 0: w = sum_i c_i y_i sigmoid(-y_i z_i) v_i, and that without v_i adds up to 0."""
    gen = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(40, 5, generator=gen, dtype=torch.float64), dim=-1)
    good = [i % 4 == 0 for i in range(40)]
    z = torch.tensor(log_density_ratios(3 * vectors, good, range(40)), dtype=torch.float64)  # their length does not count
    weight = torch.tensor([40 / 20 if g else 40 / 60 for g in good], dtype=torch.float64)
    y = torch.tensor([1.0 if g else -1.0 for g in good], dtype=torch.float64)
    pull = weight * y * torch.sigmoid(-y * z)
    b = (z - vectors @ (pull @ vectors)).mean()
    assert abs(float(pull.sum())) < 1e-5
    torch.testing.assert_close(z, vectors @ (pull @ vectors) + b, rtol=0, atol=1e-5)


def test_an_encoder_gives_the_vectors_once():
    rows, asked = drawn({True: (30, 0, 30), False: (30, 60, 0)}), []

    def encoder(texts):
        asked.append(len(texts))
        return torch.tensor([[float(word in text) for word in WORDS] for text in texts])

    for _ in range(2):
        made = run(rows, {"density_ratio": {"encoder": "some/encoder"}}, Tools(vectors={"some/encoder": encoder}.get)).examples
        weight = {w: next(e.weight for e in made if w in e.prompt_text and not e.completions[0].desirable) for w in WORDS[:2]}
        assert weight["beta"] == pytest.approx(0.5) and weight["alpha"] > 1
    assert asked == [150]  # the second time it was on disk
    made = run(rows, {"density_ratio": {"encoder": "some/encoder"}}, tools=None)
    assert "left_out" in made.transforms[0] and made.examples == rows


def test_what_it_cannot_compare():
    assert "compares the prompts of desirable and of undesirable rows, and all 2 rows are desirable" in refused(
        [row("a", True), row("b", True)], {"density_ratio": {}})
    for clip in ([0, 1], [0.5, None]):
        assert "needs None not in clip and 0 < clip[0] <= clip[1]" in refused([row("a", True)], {"density_ratio": {"clip": clip}})
    pair = parse_row({"prompt": "q", "chosen": "a", "rejected": "b"}, COLUMNS, "row 1")
    assert "reads unarys, and this is a pair row" in refused([pair], {"density_ratio": {}})


def test_bags_of_words():
    one, other, none = bags_of_words(["The fox, the FOX", "fox the", "?!"])
    assert float(one.sum()) == 4 and torch.equal(one, 2 * other) and not none.any()
    assert all(math.isfinite(x) for x in log_density_ratios(torch.stack([one, other, none]), [True, False, False], range(3)))
