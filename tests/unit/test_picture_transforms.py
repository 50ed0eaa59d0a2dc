"""Losers and wrong captions that are made of what is there, and FiFA's subset."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest

from prefopt.config.compose import typed
from prefopt.data.picture_transforms import CLASSES, distances
from prefopt.data.sources import Split
from prefopt.data.transforms import apply_transforms
from prefopt.errors import UserError
from tests.toy import data_config, example
from tests.toy_pictures import pictured
from tests.unit.test_compose import composed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "image-data.md").read_text(encoding="utf-8").partition("## Transforms of pictures\n")[2]


def changed(rows, name, seed=0, **settings):
    """(rows, what changed) after one transform."""
    split = Split("train", list(rows))
    apply_transforms([split], data_config(pictures=True, transforms={name: settings}), seed)
    return split.examples, split.transforms[0]["changed"]


def names(row) -> list[str]:
    return [c.picture["path"] for c in row.completions]


def demonstrations(*captions: str) -> list:
    return [example(prompt=caption, completion={"image": f"{i}.png"}) for i, caption in enumerate(captions)]


def test_other_pictures_are_a_shuffle_without_fixed_points():
    rows = [pictured(f"caption {i}", f"{i}.png", f"worse {i}.png") for i in range(7)]
    made, counts = changed(rows, "other_pictures")
    assert [names(row)[0] for row in made] == [f"{i}.png" for i in range(7)]
    assert [r.prompt_text for r in made] == [r.prompt_text for r in rows]
    assert sorted(names(row)[1] for row in made) == [f"{i}.png" for i in range(7)] and all(len(set(names(row))) == 2 for row in made)
    assert counts == {"losers from other rows": 7}
    assert [names(r) for r in changed(rows, "other_pictures")[0]] == [names(r) for r in made]
    assert [names(r) for r in changed(rows, "other_pictures", seed=1)[0]] != [names(r) for r in made]


def test_a_shuffle_needs_two_rows_and_different_pictures():
    with pytest.raises(UserError, match="takes losers from other rows, and there is 1 row"):
        changed(demonstrations("a cat"), "other_pictures")
    same = [example(prompt=f"c{i}", completion={"image": "same.png"}) for i in range(2)] + demonstrations("a", "b", "c")
    made, counts = changed(same, "other_pictures", seed=3)
    assert len(made) + counts.get("left out, the other row has the same picture", 0) == 5 and all(len(set(names(row))) == 2 for row in made)
    for row in changed(demonstrations("a cat", "a cat", "a dog", "a dog", "a bird", "a house"), "other_pictures")[0]:
        own, other = (int(name[0]) for name in names(row))
        assert row.prompt_text != ("a cat", "a cat", "a dog", "a dog", "a bird", "a house")[other]  # never a picture of the same caption
    with pytest.raises(UserError, match="this row's side is no picture"):
        changed([example(prompt="Q", chosen="a", rejected="b")] * 2, "other_pictures")
    with pytest.raises(UserError, match="has a thumbs-down"):
        changed([example(prompt="Q", completion={"image": "a"}, label=False)] * 2, "other_pictures")


def test_damaged_pictures_are_the_winners_after_operations():
    (row,), _ = changed([pictured("a cat", {"image": "a.png", "ops": ["grey"]}, "b.png")], "damaged_pictures", ops="blur:2 jpeg:10")
    assert [c.picture.get("ops") for c in row.completions] == [["grey"], ["grey", "blur:2", "jpeg:10"]] and set(names(row)) == {"a.png"}
    for ops, said in (("melt", "there is no operation 'melt'"), ("", "names no operation"), ("blur:-1", "needs a number in")):
        with pytest.raises(UserError, match=said):
            changed(demonstrations("a cat"), "damaged_pictures", ops=ops)


@pytest.mark.parametrize(("caption", "axes", "allowed"), [
    ("A red house", "attribute", {"A orange house", "A blue house", "A gold house"}),
    ("the cat, on the left", "place", {"the cat, on the right"}),
    ("Two dogs", "number", {"One dogs", "Three dogs", "Seven dogs"}),
])
def test_one_word_of_a_caption_becomes_wrong(caption, axes, allowed):
    found = set()
    for seed in range(60):
        (row,), counts = changed(demonstrations(caption), "wrong_captions", seed=seed, axes=axes)
        right, wrong = (c.text for c in row.completions)
        assert right == caption != wrong and set(names(row)) == {"0.png"} and counts == {"wrong captions": 1} and row.prompt_text == caption
        assert sum(a != b for a, b in zip(right.split(), wrong.split(), strict=True)) == 1
        found.add(wrong)
    assert allowed <= found


def test_captions_without_such_a_word_are_left_out_and_counted():
    made, counts = changed(demonstrations("something else", "a red cat"), "wrong_captions", words=5)
    assert len(made) == 1 and counts == {"left out, no word of the caption can be exchanged": 1, "wrong captions": 1}
    right, wrong = (c.text.split() for c in made[0].completions)
    assert right[1] != wrong[1] and right[2] != wrong[2]
    with pytest.raises(UserError, match="there is no axis colour"):
        changed(demonstrations("a red cat"), "wrong_captions", axes="colour")


def test_classes_hold_different_words():
    for members in itertools.chain(*CLASSES.values()):
        words = members.split()
        assert len(set(words)) == len(words) >= 2


# ---- FiFA ------------------------------------------------------------------------------------------------


def judged(*rows: tuple[str, float, float]) -> list:
    """(prompt, gap of the scores, quality)"""
    return [pictured(prompt, f"{i}a", f"{i}b", chosen_score=gap, rejected_score=0.0, prompt_quality=quality)
            for i, (prompt, gap, quality) in enumerate(rows)]


def kept(rows, **settings) -> list[int]:
    return [int(names(row)[0][:-1]) for row in changed(rows, "fifa", **settings)[0]]


def test_without_quality_and_diversity_the_widest_gaps_are_kept():
    rows = judged(("a", 1.0, 0), ("b", -5.0, 0), ("c", 3.0, 0), ("d", 3.0, 0), ("e", 0.5, 0))
    assert kept(rows, keep=2, gamma=0.0) == [1, 2]  # of equals the first; a gap counts whichever side it favours
    assert kept(rows, keep=9, gamma=0.0) == [0, 1, 2, 3, 4]


def test_diversity_takes_one_row_of_each_prompt():
    rows = judged(*[(p, g, 0.0) for p in ("a cat", "two dogs in rain", "houses by night") for g in (1.0, 2.0, 1.5)])
    assert kept(rows, keep=3, gamma=100.0) == [1, 4, 7]
    assert kept(rows, keep=3, gamma=0.0) == [1, 4, 7] and kept(judged(("a", 9, 0), ("a", 8, 0), ("b", 1, 0)), keep=2, gamma=100.0) == [0, 2]


def test_a_constant_in_all_qualities_changes_nothing():
    rng = random.Random(0)
    rows = [(f"{rng.choice('abc')} {rng.choice('xyz')}", rng.random(), rng.random()) for _ in range(40)]
    base = kept(judged(*rows), keep=10, alpha=1.0)
    assert base == kept(judged(*[(p, g, q + 7) for p, g, q in rows]), keep=10, alpha=1.0) != kept(judged(*rows), keep=10, alpha=0.0)


def test_fifa_says_what_it_lacks():
    rows = [pictured("a cat", "a", "b", chosen_score=1.0, rejected_score=0.0)]
    assert len(changed(rows, "fifa", keep=1)[0]) == 1
    with pytest.raises(UserError, match="from the column prompt_quality, and the row has no number there; set alpha=0"):
        changed(rows, "fifa", keep=1, alpha=1.0)
    with pytest.raises(UserError, match="needs a score of both replies"):
        changed([pictured("a cat", "a", "b")], "fifa", keep=1)


def test_distances_are_those_of_every_two_texts():
    texts = ["a red cat", "a red dog", "two boats at sea", "a red cat on a mat"]
    from prefopt.data.picture_transforms import _vector

    vectors = [_vector(t) for t in texts]
    for k in (1, 2):
        for i, found in enumerate(distances(texts, k)):
            words = sorted({word for vector in vectors for word in vector})
            points = [[vector.get(word, 0.0) for word in words] for vector in vectors]
            others = sorted(math.dist(points[i], points[j]) for j in range(len(texts)) if j != i)
            assert found == pytest.approx(others[k - 1])


def test_clear_pairs_teach_more_than_random_ones():
    """Labels drawn from Bradley-Terry: of the five percent with the widest gaps more are right."""
    rng, rows, right = random.Random(1), [], []
    for i in range(400):
        worth = rng.gauss(0, 1.5)
        right.append(rng.random() < 1 / (1 + math.exp(-abs(worth))))
        rows.append((f"prompt {i}", abs(worth), 0.0))
    chosen = kept(judged(*rows), keep=20, gamma=0.0)
    assert sum(right[i] for i in chosen) / 20 > sum(right) / 400 + 0.1


def test_the_page_has_a_command_for_every_transform_that_composes():
    start = re.search(r"`prefopt train (data=.*?)`", PAGE)[1].split()
    lines = dict(re.findall(r"^\| `(\w+)` \| .* \| `(.*)` \|$", PAGE, re.M))
    assert set(lines) == {"fifa", "other_pictures", "damaged_pictures", "wrong_captions", "win_probability", "experts"}
    for name, line in lines.items():
        words = line.split()
        assert f"transforms={name}" in words
        algo = words[0].removeprefix("algo=")
        kinds = typed(composed(*start, *words), "train", algo).data.transforms
        assert list(kinds) == ["soft_labels" if name == "win_probability" else name]
