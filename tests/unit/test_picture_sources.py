"""Image rows from tables, published sets and folders: small files with the columns and folders of the real ones."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prefopt.config.schema import TrustConfig
from prefopt.data import emoji, pictures
from prefopt.data.pictures import identity, load_picture
from prefopt.data.records import BadRow, parse_row
from prefopt.data.sources import load_data
from prefopt.data.transform_kinds import KINDS, Job, Tools
from prefopt.errors import UserError
from tests.toy import COLUMNS
from tests.unit.test_sources import from_yaml, hub, write

__all__ = ["hub"]  # the fixture


def image(number, size=(16, 16)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data(number):
    kept = io.BytesIO()
    image(number).save(kept, "PNG")
    return kept.getvalue()


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data(number))
    return path


def number_of(part):
    """Which image it is."""
    pixels = np.asarray(load_picture(part))
    return next(n for n in range(100) if (np.asarray(image(n)) == pixels).all())


def numbers(example):
    return [number_of(c.picture) for c in example.completions]


def load(name, path, trust=None, **settings):
    settings = {"eval_fraction": 0.0, "on_bad_row": "stop", **settings}
    return load_data(from_yaml(name, path=str(path), **settings), trust)


def reasons(split):
    return [r.reason for r in split.rejected]


# ---- shapes of rows ------------------------------------------------------------------------------------


def row(**columns):
    return parse_row({"prompt": "a fox", **columns}, COLUMNS, "here")


def test_image_rows_take_the_shapes_that_texts_do():
    pair = row(chosen={"image": "a.png"}, rejected={"image": "b.png", "ops": ["blur:2"]}, label=0.7)
    assert (pair.kind, pair.label, pair.chat, pair.prompt_text) == ("pair", 0.7, False, "a fox")
    assert [c.picture for c in pair.completions] == [
        {"type": "image", "path": "a.png"}, {"type": "image", "path": "b.png", "ops": ["blur:2"]}]  # fmt: skip
    ranking = row(completions=[{"image": "a.png"}, {"image": "b.png"}, {"image": "c.png"}], scores=[1, 3, 2])
    assert (ranking.kind, [c.picture["path"] for c in ranking.completions]) == ("ranking", ["b.png", "c.png", "a.png"])
    assert row(completion={"image": "a.png"}).kind == "demonstration"
    unary = row(completion={"image": "a.png"}, label=False)
    assert (unary.kind, unary.completions[0].desirable) == ("unary", False)
    dialogue = row(prompt="\n\nHuman: hi\n\nAssistant:", completion={"image": "a.png"})
    assert dialogue.prompt_text == "\n\nHuman: hi\n\nAssistant:" and len(dialogue.prompt) == 1  # a caption is a caption


def test_an_image_may_have_a_caption_of_its_own():
    example = row(chosen={"image": "a.png"}, rejected={"image": "a.png", "caption": "a wolf"})
    assert [c.text for c in example.completions] == ["", "a wolf"]
    assert [p["type"] for p in example.completions[1].messages[0].content] == ["text", "image"]
    assert not example.completions[0].same_as(example.completions[1])


def test_images_may_stand_in_messages():
    said = [{"role": "assistant", "content": [{"type": "text", "text": "a wolf"}, {"type": "image", "path": "a.png"}]}]
    held = {"role": "assistant", "content": [{"type": "image", "image": image(0)}]}
    example = row(prompt=[{"role": "user", "content": "a fox"}], chosen=said, rejected=held)
    assert (example.completions[0].text, example.completions[0].picture["path"]) == ("a wolf", "a.png")
    assert example.completions[1].picture["image"].size == (16, 16) and example.prompt_text == "a fox"


@pytest.mark.parametrize(("columns", "reason"), [
    ({"chosen": {"image": "a"}, "rejected": "text"}, "some completions of the row are images and some are not"),
    ({"chosen": {"image": "a"}, "rejected": {"image": "a"}}, "chosen and rejected are the same image"),
    ({"chosen": {"image": "a"}, "rejected": {"image": "b"}, "prompt": " "}, "the caption is empty"),
    ({"completion": {"image": "a"}, "prompt": None}, "'completion' needs a prompt"),
    ({"completion": {"image": "a", "caption": ""}}, "own caption is empty"),
    ({"completion": {"image": "a", "size": 3}}, "'size', which nothing reads"),
    ({"completion": {"image": None}}, "an image is 'None', not a path"),
    ({"completion": {"image": 3}}, "an image is '3', not a path"),
    ({"completion": {"image": "a", "ops": "blur"}}, "not a list of texts"),
    ({"completion": {"role": "user", "content": [{"type": "image", "path": "a"}]}}, "role 'user', not of the assistant"),
    ({"completions": [{"image": "a"}, {"image": "b"}], "scores": [1, 1]}, "all completions have the same score"),
    ({"chosen": {"image": "a"}, "rejected": {"image": "b"}, "prompt": [{"role": "system", "content": "x"}]}, "one user's message"),
])  # fmt: skip
def test_image_rows_that_cannot_be(columns, reason):
    with pytest.raises(BadRow, match=reason):
        row(**columns)


def test_the_transform_pairs_reads_rankings_of_images():
    """Images have no text, and are told apart all the same."""
    example = row(completions=[{"image": "a.png"}, {"image": "b.png"}, {"image": "c.png"}], scores=[3, 2, 1])
    made = KINDS["pairs"].run([example], Job("pairs", None, None, Tools()))
    assert [[c.picture["path"] for c in e.completions] for e in made] == [["a.png", "c.png"], ["a.png", "b.png"]]


# ---- tables --------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    for n in range(4):
        save(tmp_path / "set" / "images" / f"{n}.png", n)
    rows = [{"prompt": "p", "chosen": "images/0.png", "rejected": {"image": "images/1.png", "caption": "q"}},
            {"prompt": "p", "completions": ["images/2.png", "images/3.png", "images/1.png"], "ranks": [2, 1, 3]}]  # fmt: skip
    file = write(tmp_path / "set" / "rows.jsonl", rows)
    monkeypatch.chdir("/")
    for path in (file, file.parent):
        train, _ = load("pictures", path)
        assert [numbers(e) for e in train.examples] == [[0, 1], [3, 2, 1]]
        assert [e.kind for e in train.examples] == ["pair", "ranking"]


def test_data_columns_say_which_column_names_images(tmp_path):
    for n in range(2):
        save(tmp_path / f"{n}.png", n)
    write(tmp_path / "t.parquet", [{"caption": "p", "win": "1.png", "lose": "0.png", "source": "x.png"}])
    train, _ = load("pictures", tmp_path, columns={"prompt": "caption", "chosen": "win", "rejected": "lose"})
    assert numbers(train.examples[0]) == [1, 0] and train.examples[0].meta == {"source": "x.png"}


def test_a_table_may_name_cells_of_another_file(tmp_path):
    pq.write_table(pa.table({"a": [data(0), data(1)]}), tmp_path / "t.parquet")
    (tmp_path / "set").mkdir()
    cell = {"image": {"path": "t.parquet", "row": 0, "column": "a"}}
    row = {"prompt": "p", "chosen": cell, "rejected": {"image": {**cell["image"], "row": 1}}}
    assert numbers(load("pictures", write(tmp_path / "r.jsonl", [row]))[0].examples[0]) == [0, 1]
    away = {**row, "chosen": {"image": {**cell["image"], "path": str(tmp_path / "t.parquet")}}}
    with pytest.raises(UserError, match="leads out of the data's folder"):
        load("pictures", write(tmp_path / "set" / "r.jsonl", [away]))


@pytest.mark.parametrize("path", ["../out.png", "/etc/out.png", "sub/../../out.png", "link.png", "~/out.png"])
def test_paths_that_lead_out_of_the_folder(tmp_path, path):
    save(tmp_path / "out.png", 1)
    save(tmp_path / "set" / "0.png", 0)
    (tmp_path / "set" / "sub").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "out.png")
    file = write(tmp_path / "set" / "rows.json", [{"prompt": "p", "chosen": "0.png", "rejected": path}])
    with pytest.raises(UserError, match=r"rows\.json row 1: the image path .*out of the data's folder; trust.paths=true allows it"):
        load("pictures", file)
    if not path.startswith(("/", "~")):
        train, _ = load("pictures", file, TrustConfig(paths=True))
        assert numbers(train.examples[0]) == [0, 1]


def test_bytes_in_parquet_are_not_read_with_the_rows(tmp_path, monkeypatch):
    rows = [{"prompt": "p", "chosen": {"bytes": data(2 * i), "path": None}, "rejected": data(2 * i + 1),
             "completions": [data(i)] * 2} for i in range(3)]  # fmt: skip
    file = write(tmp_path / "t.parquet", rows)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "bytes_of", lambda part: pytest.fail("an image was read"))
        train, _ = load("pictures", file, columns={"completions": None})
    assert [numbers(e) for e in train.examples] == [[0, 1], [2, 3], [4, 5]]
    assert train.examples[2].completions[0].picture == {"type": "image", "path": str(file), "row": 2, "column": "chosen"}


def test_scored_sets_of_images_in_one_cell(tmp_path):
    """As for RankDPO: k images of a prompt, and a score for each."""
    rows = [{"prompt": "p", "images": [{"bytes": data(n), "path": "x"} for n in range(3)], "scores": [0.1, 0.9, 0.5]},
            {"prompt": "q", "images": [{"bytes": data(n), "path": "x"} for n in (4, 5)], "scores": [2.0, 1.0]}]  # fmt: skip
    train, _ = load("pictures", write(tmp_path / "t.parquet", rows), columns={"completions": "images"})
    assert [numbers(e) for e in train.examples] == [[1, 2, 0], [4, 5]]
    assert [c.score for c in train.examples[0].completions] == [0.9, 0.5, 0.1]


def test_bad_image_rows_name_file_and_row(tmp_path):
    save(tmp_path / "0.png", 0), save(tmp_path / "same.png", 0), save(tmp_path / "1.png", 1)
    good = {"prompt": "p", "chosen": "0.png", "rejected": "1.png"}
    rows = [good, {**good, "rejected": "gone.png"}, {**good, "rejected": "same.png"}, {**good, "prompt": ""},
            {**good, "rejected": {"image": "1.png", "ops": ["bend"]}}, {**good, "rejected": 3}]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows\.jsonl row 2: .*gone\.png: there is no such file\. Mend the row, or set data.on_bad_row"):
        load("pictures", file)
    train, _ = load("pictures", file, on_bad_row="skip")
    assert len(train.examples) == 1 and [r.origin.rpartition(" ")[2] for r in train.rejected] == ["2", "3", "4", "5", "6"]
    for reason, words in zip(reasons(train), ("no such file", "have the same bytes", "caption is empty", "no operation", "some are not"),
                             strict=True):  # fmt: skip
        assert words in reason


def test_texts_and_images_are_not_mistaken_for_each_other(tmp_path):
    save(tmp_path / "0.png", 0), save(tmp_path / "1.png", 1)
    file = write(tmp_path / "r.jsonl", [{"prompt": "p", "chosen": {"image": "0.png"}, "rejected": {"image": "1.png"}}])
    with pytest.raises(UserError, match="its completions are images; set data.pictures=true"):
        load("jsonl", file)
    texts = write(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(UserError, match="its completions are texts, and data.pictures=true"):
        load("pictures", texts)


def test_digests_see_the_bytes(tmp_path):
    def digest():
        return load("pictures", file)[0].digest()

    save(tmp_path / "0.png", 0), save(tmp_path / "1.png", 1)
    file = write(tmp_path / "r.jsonl", [{"prompt": "p", "chosen": "0.png", "rejected": "1.png"}])
    first = digest()
    (tmp_path / "1.png").rename(tmp_path / "moved.png")
    write(file, [{"prompt": "p", "chosen": "0.png", "rejected": "moved.png"}])
    assert digest() == first
    write(file, [{"prompt": "p", "chosen": "0.png", "rejected": {"image": "moved.png", "ops": ["blur:1"]}}])
    assert digest() != first
    write(file, [{"prompt": "p", "chosen": "0.png", "rejected": "moved.png"}])
    save(tmp_path / "moved.png", 2)
    assert digest() != first
    (tmp_path / "moved.png").write_bytes(b"broken")
    assert digest()  # a bad row is told where it is used


# ---- published sets ------------------------------------------------------------------------------------


def pickapic(i, label=(1.0, 0.0), **changed):
    return {"are_different": label != (0.5, 0.5), "best_image_uid": f"u{i}", "caption": f"caption {i}", "created_at": "2023-01-01",
            "has_label": True, "image_0_uid": f"a{i}", "image_0_url": "https://x/0", "image_1_uid": f"b{i}", "image_1_url": "https://x/1",
            "jpg_0": data(2 * i), "jpg_1": data(2 * i + 1), "label_0": label[0], "label_1": label[1], "model_0": "m", "model_1": "n",
            "ranking_id": i, "user_id": 1, "num_example_per_prompt": 1, "__index_level_0__": i, **changed}  # fmt: skip


def pickapic_folder(tmp_path, rows):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:3])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", rows[3:])
    write(tmp_path / "data" / "validation_unique-00000-of-00001.parquet", [pickapic(40)])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [pickapic(45)])
    return tmp_path


PICKED = [pickapic(0), pickapic(1, (0.0, 1.0)), pickapic(2, (0.5, 0.5), are_different=True), pickapic(3, has_label=False),
          pickapic(4, are_different=False), pickapic(5)]  # fmt: skip


def test_pickapic(tmp_path):
    train, held_out = load("pickapic-v2", pickapic_folder(tmp_path, PICKED))
    assert [numbers(e) for e in train.examples] == [[0, 1], [3, 2], [10, 11]] and [e.label for e in train.examples] == [1, 1, 1]
    assert [e.prompt_text for e in held_out.examples] == ["caption 40"] and not train.rejected
    assert dict(train.no_preference) == {"a tie: both labels are 0.5": 1, "has_label is false: nobody has judged it": 1,
                                         "are_different is false: its two images are the same": 1}
    assert train.examples[0].meta["model_1"] == "n"


def test_pickapic_with_ties_as_soft_labels(tmp_path):
    train, _ = load("pickapic-v2", pickapic_folder(tmp_path, PICKED), rows="pickapic-soft")
    assert [e.label for e in train.examples] == [1, 1, 0.5, 1] and numbers(train.examples[2]) == [4, 5]


def test_pickapic_without_what_it_needs(tmp_path):
    bare = {k: v for k, v in pickapic(0).items() if k not in ("jpg_0", "jpg_1")}
    with pytest.raises(UserError, match="no column 'jpg_0' .*Versions without images cannot be trained on"):
        load("pickapic-v2", pickapic_folder(tmp_path, [bare] * 4))
    train, _ = load("pickapic-v2", pickapic_folder(tmp_path / "b", [pickapic(0), pickapic(1, (1.0, 1.0)), pickapic(2), pickapic(3)]),
                    on_bad_row="skip")  # fmt: skip
    assert reasons(train) == ["label_0 is 1.0 and label_1 is 1.0; they must be 1 and 0, 0 and 1, or 0.5 both"]
    with pytest.raises(UserError, match="is a file, and data.train=data/train.* set data.train=null"):
        load("pickapic-v2", tmp_path / "data" / "test-00000-of-00001.parquet")


def test_hpdv2(tmp_path):
    for n in range(5):
        save(tmp_path / ("train" if n < 4 else "test") / f"{n:08}.jpg", n)
    save(tmp_path / "test" / "00000000.jpg", 10), save(tmp_path / "test" / "00000001.jpg", 11)
    write(tmp_path / "train.json", [
        {"human_preference": [1, 0], "prompt": "p", "image_path": ["00000000.jpg", "00000001.jpg"], "user_hash": "u"},
        {"human_preference": [0, 1], "prompt": "q", "file_path": ["00000002.jpg", "00000003.jpg"]},
        {"human_preference": [0, 0], "prompt": "q", "file_path": ["00000002.jpg", "00000003.jpg"]}])  # fmt: skip
    write(tmp_path / "test.json", [
        {"prompt": "r", "image_path": ["00000000.jpg", "00000001.jpg", "00000004.jpg"], "rank": [2, 1, 3],
         "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "u"}]}])  # fmt: skip
    train, held_out = load("hpdv2", tmp_path)
    assert [numbers(e) for e in train.examples] == [[0, 1], [3, 2]] and [numbers(e) for e in held_out.examples] == [[11, 10, 4]]
    assert train.no_preference.total() == 1 and held_out.examples[0].kind == "ranking"


@pytest.mark.parametrize(("rows", "labels"), [("hpdv3", [1, 1]), ("hpdv3-soft", [12 / 19, 1])])
def test_hpdv3(tmp_path, rows, labels):
    for n in range(4):
        save(tmp_path / "images" / f"{n}.jpg", n)
    made = [{"prompt": "p", "path1": "images/1.jpg", "path2": "images/0.jpg", "choice_dist": [12, 7], "confidence": 0.99, "model1": "a",
             "model2": "b", "source": "x"},
            {"prompt": "q", "path1": "images/2.jpg", "path2": "images/3.jpg", "choice_dist": [4, 0], "confidence": None, "model1": "a",
             "model2": "b", "source": "x"}]  # fmt: skip
    write(tmp_path / "train.json", made)
    write(tmp_path / "test.json", made[:1])
    train, held_out = load("hpdv3", tmp_path, rows=rows)
    assert [numbers(e) for e in train.examples] == [[1, 0], [2, 3]] and len(held_out.examples) == 1
    assert [e.label for e in train.examples] == pytest.approx(labels)
    assert train.examples[0].meta["confidence"] == 0.99


def test_hpdv3_without_votes(tmp_path):
    save(tmp_path / "0.jpg", 0), save(tmp_path / "1.jpg", 1)
    write(tmp_path / "train.json", [{"prompt": "p", "path1": "0.jpg", "path2": "1.jpg", "choice_dist": None}])
    write(tmp_path / "test.json", [{"prompt": "p", "path1": "0.jpg", "path2": "1.jpg"}])
    assert len(load("hpdv3", tmp_path)[0].examples) == 1
    with pytest.raises(UserError, match="choice_dist is None; soft labels need the votes"):
        load("hpdv3", tmp_path, rows="hpdv3-soft")


def test_imagerewarddb(tmp_path):
    """A row per image, spread over files and mixed; paths are relative to the set's root."""
    def entry(n, prompt, rank, part):
        path = f"images/{part}/{part.rpartition('/')[2]}_1/{n}.webp"
        save(tmp_path / path, n)
        return {"image_path": path, "prompt_id": f"id-{prompt}", "prompt": prompt, "classification": "People", "image_amount_in_total": 3,
                "rank": rank, "overall_rating": 4, "image_text_alignment_rating": 4, "fidelity_rating": 4}  # fmt: skip

    rows = [entry(0, "a", 2, "train"), entry(1, "b", 1, "train"), entry(2, "a", 1, "train"), entry(3, "b", 1, "train"),
            entry(4, "c", 1, "train"), entry(5, "a", 3, "train")]  # fmt: skip
    write(tmp_path / "images" / "train" / "train_1" / "train_1.json", rows)
    write(tmp_path / "images" / "validation" / "validation_1" / "validation_1.json", [entry(7, "d", 2, "validation"),
                                                                                      entry(8, "d", 1, "validation")])  # fmt: skip
    train, held_out = load("imagereward", tmp_path)
    assert [(e.prompt_text, numbers(e)) for e in train.examples] == [("a", [2, 0, 5])] and numbers(held_out.examples[0]) == [8, 7]
    assert dict(train.no_preference) == {"a tie: all 2 images have the same rank": 1, "fewer than two images of its prompt": 1}


def test_imagereward_test_rows(tmp_path):
    for n in range(3):
        save(tmp_path / "part" / f"{n}.webp", n)
    rows = [{"id": "1", "prompt": "p", "generations": [f"part/{n}.webp" for n in range(3)], "ranking": [3, 1, 2]}]
    train, _ = load("imagereward", write(tmp_path / "test.json", rows), train=None, eval=None)
    assert numbers(train.examples[0]) == [1, 2, 0] and train.examples[0].meta == {"id": "1"}


def test_images_of_hub_datasets_are_read_from_files(hub):
    write(hub / "data" / "train.parquet", [{"prompt": "p", "chosen": data(0), "rejected": data(1)}])
    with pytest.raises(UserError, match=r"holds images\. Fetch its files .hf download.*data=pictures data.path=FOLDER"):
        load_data(from_yaml("pictures", source="hub", path=str(hub), train="train"))


# ---- generated and fetched -----------------------------------------------------------------------------


def test_tiny_pictures_are_rows_of_images():
    train, held_out = load_data(from_yaml("tiny-pictures", limit=3, eval_limit=2))
    assert [len(s.examples) for s in (train, held_out)] == [3, 2] and all(e.kind == "pair" for e in train.examples)
    assert load_picture(train.examples[0].completions[0].picture).mode == "RGB"
    ranked, _ = load_data(from_yaml("tiny-pictures", limit=2, eval_limit=2, completions=4))
    assert all(e.kind == "ranking" and len(e.completions) == 4 for e in ranked.examples)


def package(folder):
    """The real package's layout, with six drawings."""
    tones = {tone: {"image": f"1f385-{tone.lower()}.png", "has_img_twitter": True} for tone in ("1F3FB", "1F3FF")}
    couple = {"1F3FB-1F3FE": {"image": "couple.png", "has_img_twitter": True}, "1F3FB-1F3FB": {"image": "no.png", "has_img_twitter": False}}
    drawn, people = {"has_img_twitter": True}, "People & Body"
    known = [{"name": "LADY BEETLE", "category": "Animals & Nature", "image": "bug.png", **drawn},
             {"name": "FATHER CHRISTMAS", "category": people, "image": "1f385.png", **drawn, "skin_variations": tones},
             {"name": "COUPLE", "category": people, "image": "no.png", "has_img_twitter": False, "skin_variations": couple},
             {"name": "Türkiye Flag", "category": "Flags", "image": "flag.png", **drawn}]  # fmt: skip
    for n, name in enumerate(("bug", "1f385", "1f385-1f3fb", "1f385-1f3ff", "couple", "flag")):
        save(folder / emoji.IMAGES / f"{name}.png", n)
    (folder / "emoji.json").write_text(json.dumps(known))
    return folder


def test_emoji(tmp_path):
    train, _ = load("emoji", package(tmp_path))
    assert [(e.kind, e.prompt_text, *numbers(e)) for e in train.examples] == [
        ("demonstration", "lady beetle", 0), ("demonstration", "father christmas", 1),
        ("demonstration", "father christmas, light skin tone", 2), ("demonstration", "father christmas, dark skin tone", 3),
        ("demonstration", "couple, light and medium-dark skin tones", 4), ("demonstration", "Türkiye Flag", 5)]  # fmt: skip
    half, held_out = load("emoji", tmp_path, eval_fraction=0.6)
    names = [{e.prompt_text.partition(",")[0] for e in s.examples} for s in (half, held_out)]
    assert len(half.examples) + len(held_out.examples) == 6 and names[0] and names[1] and not names[0] & names[1]


def test_emoji_is_fetched_once_and_checked(tmp_path, monkeypatch):
    source = package(tmp_path / "package")
    (source / "img" / "twitter" / "sheets").mkdir()
    (source / "img" / "twitter" / "sheets" / "64.png").write_bytes(b"large")
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.add(source, "package")
    content, asked = (tmp_path / "p.tgz").read_bytes(), []
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(content))
    with pytest.raises(UserError, match="is not version 16.0.0 of the package"):
        load("emoji", "")
    assert not list((tmp_path / "cache" / "emoji").iterdir())
    monkeypatch.setattr(emoji, "SHA512", hashlib.sha512(content).hexdigest())
    for _ in range(2):
        assert len(load("emoji", "")[0].examples) == 6
    assert len(asked) == 2 and not list((tmp_path / "cache").rglob("sheets"))


def test_emoji_without_a_network(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no route")

    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji.urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match="cannot be fetched .no route.*npm pack emoji-datasource-twitter@16.0.0.*data.path=FOLDER"):
        load("emoji", "")
    with pytest.raises(UserError, match="it holds no readable emoji.json"):
        load("emoji", tmp_path)


def test_a_run_elsewhere_sees_the_same_images(tmp_path):
    """An image is known by its bytes, wherever it lies: in a file, or in a cell."""
    save(tmp_path / "0.png", 0)
    pq.write_table(pa.table({"a": [data(0)]}), tmp_path / "t.parquet")
    cell = {"type": "image", "path": str(tmp_path / "t.parquet"), "row": 0, "column": "a"}
    assert identity(cell) == identity({"type": "image", "path": str(tmp_path / "0.png")})
    assert os.path.getsize(tmp_path / "0.png") == len(data(0))
