"""Folders of images: pairs in two folders, as kohya and SimpleTuner have them too, and captions beside the images."""

from pathlib import Path

import pytest

from prefopt.config.schema import TrustConfig
from prefopt.data.dataset import Dataset
from prefopt.errors import UserError
from prefopt.training.setup import say_rejected
from tests.unit.test_picture_sources import load, numbers, reasons, save


def test_two_folders_of_the_same_names_are_pairs(tmp_path):
    for n, name in enumerate(("a", "b", "sub/c")):
        save(tmp_path / "chosen" / f"{name}.png", n)
        save(tmp_path / "rejected" / f"{name}.jpg", 10 + n)
        (tmp_path / ("rejected" if n == 1 else "chosen") / f"{name}.txt").write_text(f"caption {n}\n")
    train, _ = load("picture-folders", tmp_path)
    assert [(e.kind, e.prompt_text, *numbers(e)) for e in train.examples] == [
        ("pair", f"caption {n}", n, 10 + n) for n in range(3)]  # fmt: skip
    (tmp_path / "chosen").rename(tmp_path / "winners")
    train, _ = load("picture-folders", tmp_path, columns={"chosen": "winners"})
    assert len(train.examples) == 3


def test_what_is_wrong_with_pair_folders(tmp_path):
    for n, name in enumerate(("alone", "bare", "both", "differs", "fine")):
        save(tmp_path / "chosen" / f"{name}.png", n)
        if name != "alone":
            save(tmp_path / "rejected" / f"{name}.png", 10 + n)
        if name != "bare":
            (tmp_path / "chosen" / f"{name}.txt").write_text(name)
    save(tmp_path / "rejected" / "over.png", 20)
    save(tmp_path / "chosen" / "both.jpg", 21)
    (tmp_path / "rejected" / "differs.txt").write_text(" ")
    train, _ = load("picture-folders", tmp_path, on_bad_row="skip")
    assert [e.prompt_text for e in train.examples] == ["fine"]
    assert [(Path(r.origin).name, r.reason) for r in train.rejected] == [
        ("alone.png", "there is no image alone in rejected"),
        ("bare.png", "it has no caption: there is no bare.txt or bare.caption in either folder"),
        ("both.jpg", "both.jpg and both.png have the same name but for their ending"),
        ("differs.png", "an image's own caption is empty or no text"),
        ("over.png", "there is no image over in chosen")]  # fmt: skip
    (tmp_path / "rejected").rename(tmp_path / "losers")
    with pytest.raises(UserError, match="there is a folder chosen and none called rejected; .*data.columns.rejected=NAME"):
        load("picture-folders", tmp_path)


def test_a_plain_folder_is_demonstrations(tmp_path):
    for n in range(3):
        save(tmp_path / f"{n}.png", n)
        if n:
            (tmp_path / f"{n}.txt").write_text(f"caption {n}")
    save(tmp_path / ".hidden.png", 9)
    train, _ = load("picture-folders", tmp_path, on_bad_row="skip")
    assert [(e.kind, e.prompt_text, *numbers(e)) for e in train.examples] == [("demonstration", f"caption {n}", n) for n in (1, 2)]
    assert reasons(train) == ["it has no caption: there is no 0.txt or 0.caption"]
    (tmp_path / "1.txt").write_text(" ")
    (tmp_path / "2.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="no usable row among 3"):
        load("picture-folders", tmp_path, on_bad_row="skip")


def pair_of(better, worse, number=0, captions=("a red fox", None), ending=".caption"):
    """Two images of one pair, with the captions that lie beside them."""
    for file, n, caption in zip((better, worse), (number, 50 + number), captions, strict=True):
        save(file, n)
        if caption is not None:
            file.with_suffix(ending).write_text(caption + "\n")


def test_where_captions_differ_each_side_has_its_own(tmp_path):
    pair_of(tmp_path / "chosen" / "0.png", tmp_path / "rejected" / "0.png", 0, ("a fox", "a wolf"))
    pair_of(tmp_path / "chosen" / "1.png", tmp_path / "rejected" / "1.png", 1, ("a fox", "a fox"), ".txt")
    train, _ = load("picture-folders", tmp_path)
    assert [(e.prompt_text, [c.text for c in e.completions]) for e in train.examples] == [("a fox", ["", "a wolf"]), ("a fox", ["", ""])]
    assert [numbers(e) for e in train.examples] == [[0, 50], [1, 51]]


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_kohyas_winners_and_losers(tmp_path, ending):
    inner = tmp_path / "dataset" / "1_name"
    pair_of(inner / "w" / "x.png", inner / "l" / "x.png", ending=ending)
    for path in (inner.parent, inner):
        train, _ = load("picture-folders", path)
        assert [(e.kind, e.prompt_text, *numbers(e)) for e in train.examples] == [("pair", "a red fox", 0, 50)]
    pair_of(inner / "chosen" / "y.png", inner / "rejected" / "y.png", 1)  # the configured names come first
    assert [numbers(e) for e in load("picture-folders", inner)[0].examples] == [[1, 51]]


def test_folders_with_repeat_numbers_are_read_one_after_the_other(tmp_path, capsys):
    for n, name in enumerate(("10_dog", "2_cat")):
        pair_of(tmp_path / name / "w" / "x.png", tmp_path / name / "l" / "x.png", n, (name, f"no {name}"))
    splits = load("picture-folders", tmp_path, eval_fraction=0.5)
    rows = sorted((e.prompt_text, *numbers(e)) for split in splits for e in split.examples)
    assert rows == [("10_dog", 0, 50), ("2_cat", 1, 51)]
    empty = Dataset([], [])
    say_rejected(*splits, empty, empty)
    assert capsys.readouterr().err == "data: the repeat numbers of folders (10_dog, 2_cat) are ignored, each pair counts once\n"


def test_what_is_wrong_with_kohyas_folders(tmp_path):
    pair_of(tmp_path / "1_a" / "w" / "x.png", tmp_path / "1_a" / "l" / "x.png")
    save(tmp_path / "1_a" / "w" / "alone.png", 7)
    with pytest.raises(UserError, match=r"1_a/w/alone\.png: there is no image alone in l\. Mend the row"):
        load("picture-folders", tmp_path)
    save(tmp_path / "1_b" / "z.png", 8)
    with pytest.raises(UserError, match="1_b holds no folders of chosen and rejected images, and others do"):
        load("picture-folders", tmp_path)
    (tmp_path / "1_a" / "l").rename(tmp_path / "1_a" / "x")
    (tmp_path / "1_a" / "x").rename(tmp_path / "away")
    with pytest.raises(UserError, match="1_a: there is a folder w and none called l; pairs are files of the same name in both"):
        load("picture-folders", tmp_path / "1_a")


def test_beside_other_folders_a_w_is_any_letter(tmp_path):
    for n, letter in enumerate("vwx"):
        save(tmp_path / letter / "0.png", n).with_suffix(".txt").write_text(letter)
    assert [e.prompt_text for e in load("picture-folders", tmp_path)[0].examples] == ["v", "w", "x"]


def test_pairs_of_two_independent_folders(tmp_path):
    """As SimpleTuner has them: two data sets whose files have the same names."""
    pair_of(tmp_path / "good" / "x.png", tmp_path / "bad" / "x.png", ending=".txt")
    for path, chosen, rejected in ((tmp_path / "good", ".", "../bad"), (tmp_path / "bad", "../good", "."), (tmp_path, "good", "bad")):
        columns = {"chosen": chosen, "rejected": rejected}
        train, _ = load("picture-folders", path, TrustConfig(paths=True), columns=columns)
        assert [(e.prompt_text, *numbers(e)) for e in train.examples] == [("a red fox", 0, 50)]
        if path == tmp_path:
            assert len(load("picture-folders", path, columns=columns)[0].examples) == 1
        else:
            with pytest.raises(UserError, match=r"the folder \.\./\w+ leads out of the data's folder; trust\.paths=true allows it"):
                load("picture-folders", path, columns=columns)
    save(tmp_path / "good" / "alone.png", 7)
    with pytest.raises(UserError, match=r"good/alone\.png: there is no image alone in bad\. Mend the row"):
        load("picture-folders", tmp_path / "good", TrustConfig(paths=True), columns={"chosen": ".", "rejected": "../bad"})


@pytest.mark.parametrize(("chosen", "rejected", "reason"), [
    (".", "../gone", "there is a folder good and none called gone"), (".", "sub", r"of the folders \. and sub one lies in the other"),
    ("sub", "link", "the folder link leads out of the data's folder"), (".", ".", r"of the folders \. and \. one lies in the other"),
])  # fmt: skip
def test_two_folders_that_cannot_be(tmp_path, chosen, rejected, reason):
    pair_of(tmp_path / "good" / "x.png", tmp_path / "bad" / "x.png")
    save(tmp_path / "good" / "sub" / "x.png", 3)
    (tmp_path / "good" / "link").symlink_to(tmp_path / "bad")
    with pytest.raises(UserError, match=reason):
        load("picture-folders", tmp_path / "good", columns={"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(("path", "reason"), [("nowhere", "there is no such folder"), ("empty", "the folder holds no image")])
def test_folders_without_images(tmp_path, path, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=reason):
        load("picture-folders", tmp_path / path)


def test_folders_are_looked_for_from_where_one_stands(tmp_path, monkeypatch):
    for n, name in enumerate(("here", "there")):
        pair_of(tmp_path / name / "w" / "x.png", tmp_path / name / "l" / "x.png", n)
        monkeypatch.chdir(tmp_path / name)
        assert [numbers(e) for e in load("picture-folders", ".")[0].examples] == [[n, 50 + n]]
