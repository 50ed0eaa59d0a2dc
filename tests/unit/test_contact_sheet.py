"""`prefopt data check` on rows with images: what it counts and lists, and the sheet that it draws."""

import json

import numpy as np
import pytest
from PIL import Image

from prefopt.config.schema import DataCheckConfig, ModelConfig
from prefopt.data.pictures import Framing
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from prefopt.evaluation.contact_sheet import SIDE, write_sheet
from prefopt.evaluation.data_check import check_text, names
from prefopt.report.picture_grid import MARGIN, sheet
from tests import tiny_pipelines as pipelines
from tests.unit.test_sources import from_yaml

DPO = {"name": "dpo", "_target_": "prefopt.objectives.pairwise.DPO"}


def save(folder, name, seed=None, height=32, width=32, colour=None, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    image = Image.fromarray(pixels, mode) if colour is None else Image.new("RGB", (width, height), colour)
    image.save(folder / name)
    return name


@pytest.fixture
def check(tmp_path):
    def run(rows, sheet="sheet.png", resolution=16, path=None, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = from_yaml("pictures", path=str(tmp_path / "rows.jsonl"), **{"eval_fraction": 0.0, **settings})
        model = ModelConfig(name="a-model", kind="diffusion", path=path, resolution=resolution)
        return check_text(DataCheckConfig(algo=dict(DPO), model=model, data=data, sheet=sheet))

    return run


def test_counts_sizes_ties_and_broken_rows(tmp_path, check):
    for n in range(6):
        save(tmp_path, f"{n}.png", n, width=32 + 8 * n)
    save(tmp_path, "alpha.png", 9, mode="RGBA"), save(tmp_path, "small.png", 10, height=8)
    save(tmp_path, "cut.png", 11)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    rows = [{"prompt": f"p{n}", "chosen": f"{n}.png", "rejected": f"{n + 1}.png"} for n in range(4)]
    rows += [rows[0], {**rows[1], "label": 0.5, "prompt": "soft"}, {**rows[0], "chosen": "alpha.png"}, {**rows[0], "chosen": "small.png"},
             {**rows[0], "chosen": "cut.png"}, {**rows[0], "chosen": "gone.png"}]  # fmt: skip
    text = check(rows)
    lines = [line.split() for line in text.splitlines()]
    assert "data=pictures as algo=dpo (view: pairs) and model=a-model would see it" in text
    assert "train: 7 usable rows, 3 broken" in text and ["kinds", "pair", "7"] in lines
    assert ["height", "32", "32", "32", "32"] in lines and ["width", "32", "40", "64", "64"] in lines
    assert "14, 6 of them distinct; the first 6 were decoded" in text and "16 x 16: 14" in text
    assert "1 laid on white (alpha)" in text and "1 rows repeat an earlier one" in text and "1 of 1 soft labels are 0.5" in text
    for reason in ("row 8: ", "small.png: it has 32 x 8 pixels", "row 9: ", "cut.png: it is damaged or cut off",
                   "gone.png: there is no such file"):  # fmt: skip
        assert reason in text
    assert "A run would stop at the first of them" in text and "contact sheet of 7 training rows: sheet.png" in text


def test_buckets_are_shown(tmp_path, check):
    save(tmp_path, "a.png", 0, height=64, width=128), save(tmp_path, "b.png", 1, height=64, width=128)
    text = check([{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}], resolution=32, buckets=8)
    assert "40 x 24: 2" in text


def test_the_objective_must_be_able_to_read_the_rows(tmp_path, check):
    save(tmp_path, "a.png", 0)
    with pytest.raises(UserError, match="this is a demonstration row, and the objective needs pairs"):
        check([{"prompt": "p", "completion": "a.png"}])


def test_the_sheet_shows_what_a_model_sees(tmp_path, check):
    """Side by side, the middle of each, named and with the caption below."""
    wide = Image.new("RGB", (300, 100), "blue")
    wide.paste(Image.new("RGB", (100, 100), (200, 0, 0)), (100, 0))
    wide.save(tmp_path / "wide.png")
    save(tmp_path, "b.png", colour=(0, 200, 0), height=100, width=100)
    check([{"prompt": "a caption", "chosen": "wide.png", "rejected": "b.png"}], resolution=64)
    sheet = Image.open("sheet.png")
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[200, 0, 0] > 0.95 * SIDE * SIDE and colours[0, 200, 0] == SIDE * SIDE and (0, 0, 255) not in colours
    assert (0, 0, 0) in colours and sheet.width == 2 * (2 * (SIDE + MARGIN) + MARGIN)


def test_captions_that_no_text_encoder_reads_to_their_end_are_counted_without_weights(tmp_path, check):
    pipeline = pipelines.save("sd15", tmp_path / "sd15")
    for weights in pipeline.rglob("*.safetensors"):
        weights.unlink()
    save(tmp_path, "a.png", 0), save(tmp_path, "b.png", 1)
    sides = {"chosen": "a.png", "rejected": "b.png"}
    rows = [{"prompt": "red " * 14, **sides}, {"prompt": "blue " * 15, **sides}, {"prompt": "blue " * 15, **sides},
            {"prompt": "red", **sides, "rejected": {"image": "b.png", "caption": "green " * 20}}]  # fmt: skip
    text = check(rows, path=str(pipeline))
    assert "2 of 4 captions are longer than the 16 tokens that model=a-model reads, such as 'blue blue" in text
    assert "0 of 2 captions are longer" in check([rows[0], {"prompt": "red", **sides}], path=str(pipeline))
    assert "captions too long for the text encoders of model=a-model are not counted: model.path is not set" in check(rows)


def test_rankings_and_long_captions_have_room():
    square = Image.new("RGB", (SIDE, SIDE), "red")
    drawn = sheet([("word " * 60, [(f"number {n}", square) for n in range(4)]), ("short", [("one", square)]), ("third", [("one", square)])])
    assert drawn.width == 2 * (4 * (SIDE + MARGIN) + MARGIN)
    assert {colour: count for count, colour in drawn.getcolors(1 << 20)}[255, 0, 0] == 6 * SIDE * SIDE


def test_a_sheet_that_cannot_be_written(tmp_path, check):
    save(tmp_path, "a.png", 0), save(tmp_path, "b.png", 1)
    row = {"prompt": "p", "chosen": "a.png", "rejected": "b.png"}
    with pytest.raises(UserError, match="sheet=nowhere/s.png: it cannot be written"):
        check([row], sheet="nowhere/s.png")
    assert "contact sheet" not in check([row], sheet=None)


def test_many_rows_are_shown_evenly_spread(tmp_path):
    for n in range(50):
        save(tmp_path, f"{n}.png", colour=(5 * n, 0, 255), height=16, width=16)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "p", "completion": f"{n}.png"}) + "\n" for n in range(50)))
    train, _ = load_data(from_yaml("pictures", path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0))
    said = write_sheet(str(tmp_path / "s.png"), train.examples, Framing(16), names)
    blue = [colour[0] // 5 for _, colour in Image.open(tmp_path / "s.png").getcolors(1 << 20) if colour[2] == 255 and colour[1] == 0]
    assert said == f"contact sheet of 24 training rows: {tmp_path / 's.png'}"
    assert len(blue) == 24 and min(blue) == 0 and max(blue) >= 47
