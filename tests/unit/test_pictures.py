"""Images: what is read and what is refused, operations, frames and crops, and what is remembered of files."""

import io
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from prefopt.config.schema import DataConfig
from prefopt.data import pictures
from prefopt.data.pictures import Framing, apply, buckets, check_row, facts, identity, load_picture, parse_op, prepare, size_of
from prefopt.data.records import BadRow, parse_row
from prefopt.errors import UserError
from tests.toy import COLUMNS


def pixels(height=24, width=32, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, kind="PNG", **settings):
    kept = io.BytesIO()
    image.save(kept, kind, **settings)
    return kept.getvalue()


def part(path):
    return {"type": "image", "path": str(path)}


def saved(folder, image, name="a.png", age=100, **settings):
    """An image file that was written a while ago."""
    image.save(folder / name, **settings)
    stamp = os.stat(folder / name).st_mtime - age
    os.utime(folder / name, (stamp, stamp))
    return part(folder / name)


# ---- reading -------------------------------------------------------------------------------------------


def test_colours_come_out_as_they_are(tmp_path):
    given = pixels()
    assert (np.asarray(load_picture(saved(tmp_path, Image.fromarray(given)))) == given).all()
    held = load_picture({"type": "image", "image": Image.fromarray(given)})
    assert held.mode == "RGB" and (np.asarray(held) == given).all()


def test_transparency_is_laid_on_white(tmp_path):
    given = pixels(channels=4)
    given[..., 3] = 0
    given[:4, :, 3] = 255
    out = np.asarray(load_picture(saved(tmp_path, Image.fromarray(given, "RGBA"))))
    assert (out[:4] == given[:4, :, :3]).all() and (out[4:] == 255).all()
    half = np.full((2, 2, 4), (0, 0, 0, 128), dtype=np.uint8)
    assert (np.asarray(load_picture(saved(tmp_path, Image.fromarray(half, "RGBA")))) == 127).all()
    palette = Image.fromarray(np.zeros((4, 4), dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30])
    where = saved(tmp_path, palette, transparency=0)
    assert (np.asarray(load_picture(where)) == 255).all() and facts(where).notes == "alpha"


def test_grey_gets_three_channels(tmp_path):
    given = pixels(channels=1)[..., 0]
    where = saved(tmp_path, Image.fromarray(given))
    assert (np.asarray(load_picture(where)) == given[..., None]).all() and facts(where).notes == "grey"


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_photograph_is_turned_as_its_exif_says(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    given = pixels(16, 48)
    where = saved(tmp_path, Image.fromarray(given), name, exif=exif)
    out = load_picture(where)
    assert (out.height, out.width) == (48, 16) == (facts(where).height, facts(where).width)
    assert (np.asarray(out) == np.rot90(given, -1)).all()


@pytest.mark.parametrize(("content", "reason"), [
    (b"no image at all", r"a\.png: it is no readable image \(15 bytes\)"),
    (b"", r"it is no readable image \(0 bytes\)"),
    (encoded(Image.fromarray(pixels()))[:400], "it is damaged or cut off"),
    (encoded(Image.fromarray(pixels()), "JPEG")[:-300], "it is damaged or cut off"),
    (encoded(Image.new("CMYK", (8, 8)), "JPEG"), "its channels are CMYK; only RGB, grey and palette"),
    (encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16))), "its channels are I;16"),
    (encoded(Image.new("RGB", (8, 8)), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]), "it has 2 frames"),
], ids=["text", "empty", "cut_png", "cut_jpeg", "cmyk", "sixteen_bits", "animated"])  # fmt: skip
def test_what_cannot_be_read_is_a_bad_row(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadRow, match=reason):
        load_picture(part(tmp_path / "a.png"))


@pytest.mark.parametrize("limit", ["PIL's", "ours"])
def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch, limit):
    where = saved(tmp_path, Image.new("RGB", (300, 300)))
    if limit == "ours":
        monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (load_picture, facts):
        with pytest.raises(BadRow, match="million"):
            read(where)


def test_a_file_that_is_not_there(tmp_path):
    for read in (load_picture, facts):
        with pytest.raises(BadRow, match="gone.png: there is no such file"):
            read(part(tmp_path / "gone.png"))


def test_cells_of_a_parquet_file(tmp_path):
    """Bytes, {bytes, path} and lists of them, over several row groups; an empty cell says so."""
    given = [pixels(seed=i) for i in range(7)]
    data = [encoded(Image.fromarray(g)) for g in given]
    rows = [{"a": d, "b": {"bytes": d, "path": "x.png"}, "c": [d, data[0]]} for d in data]
    pq.write_table(pa.Table.from_pylist([*rows, {"a": None, "b": None, "c": None}]), tmp_path / "t.parquet", row_group_size=3)
    cell = {"type": "image", "path": str(tmp_path / "t.parquet")}
    for i in (6, 0, 4):
        for column, index in (("a", {}), ("b", {}), ("c", {"index": 0})):
            assert (np.asarray(load_picture({**cell, "row": i, "column": column, **index})) == given[i]).all()
    assert facts({**cell, "row": 5, "column": "c", "index": 1}).sha == facts({**cell, "row": 0, "column": "a"}).sha
    for column, index in (("a", {}), ("b", {}), ("c", {"index": 0})):
        with pytest.raises(BadRow, match=r"t\.parquet row 8 column [abc].*holds no image bytes"):
            load_picture({**cell, "row": 7, "column": column, **index})
    with pytest.raises(BadRow, match="there is no row 9"):
        load_picture({**cell, "row": 8, "column": "a"})


# ---- what is remembered --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    pictures.forget()
    yield tmp_path / "store"
    pictures.forget()


def test_bytes_are_hashed_once(tmp_path, store, monkeypatch):
    where = saved(tmp_path, Image.fromarray(pixels()))
    known = facts(where)
    assert (known.height, known.width, known.notes) == (24, 32, "")
    pictures.forget()  # another process
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "bytes_of", lambda part: pytest.fail("the file was read again"))
        assert facts(where) == known
    saved(tmp_path, Image.fromarray(pixels(seed=1)), age=50)
    assert facts(where).sha != known.sha


def test_a_torn_line_and_a_young_file_are_not_believed(tmp_path, store):
    where = saved(tmp_path, Image.fromarray(pixels()))
    known = facts(where)
    (page,) = store.glob("pictures/*.tsv")
    page.write_text(page.read_text()[:-10])
    pictures.forget()
    assert facts(where) == known and len(page.read_text().splitlines()) == 1
    young = saved(tmp_path, Image.fromarray(pixels(seed=2)), "young.png", age=0)
    facts(young)
    assert "young" not in page.read_text()


def test_a_store_that_cannot_be_written_is_no_obstacle(tmp_path, store):
    store.write_text("a file where a folder is needed")
    where = saved(tmp_path, Image.fromarray(pixels()))
    assert facts(where) == facts(where)


# ---- operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["blur:2", "crop:0.5", "flip", "grey", "jpeg:10", "noise:20"])
def test_operations_follow_from_the_image_alone(op):
    image = Image.fromarray(pixels(seed=3))
    first, again = apply(op, image), apply(op, image.copy())
    assert first.mode == "RGB" and first.tobytes() == again.tobytes() != image.tobytes()


def test_operations_do_what_they_say(tmp_path):
    given = pixels(20, 40, seed=4)
    image = Image.fromarray(given)
    assert (np.asarray(apply("flip", image)) == given[:, ::-1]).all()
    assert (np.asarray(apply("crop:0.5", image)) == given[5:15, 10:30]).all()
    grey = np.asarray(apply("grey", image))
    assert (grey == grey[..., :1]).all()
    assert np.asarray(apply("blur:3", image), dtype=float).std() < 0.5 * given.std()
    flat = Image.new("RGB", (100, 100), (128, 128, 128))
    assert abs(np.asarray(apply("noise:20", flat), dtype=float).std() - 20) < 0.5
    where = {**saved(tmp_path, image), "ops": ["crop:0.5", "flip"]}
    assert (np.asarray(load_picture(where)) == given[5:15, 10:30][:, ::-1]).all()
    assert size_of(where) == (10, 20) and identity(where) == (facts(where).sha, "crop:0.5", "flip")


@pytest.mark.parametrize(("op", "reason"), [
    ("bend:2", "no operation 'bend' on images .known: blur, crop"), ("blur", "needs a number"), ("blur:x", "needs a number"),
    ("blur:nan", "needs a number"), ("crop:2", r"needs a number in \[0.01, 1\]"), ("flip:1", "takes no number"),
])  # fmt: skip
def test_operations_that_do_not_exist(op, reason):
    with pytest.raises(BadRow, match=reason):
        parse_op(op)


# ---- frames --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (32, 8), (64, 16)])
def test_buckets_have_about_the_models_area(resolution, step):
    found = buckets(resolution, step)
    assert (resolution, resolution) in found and len(found) == len(set(found))
    for height, width in found:
        assert height % step == width % step == 0
        assert 0.5 * resolution <= min(height, width) and max(height, width) <= 2 * resolution
        assert 0.65 * resolution**2 < height * width <= resolution**2
        assert (width, height) in found


def test_trap_4_7_one_frame_for_all_images_of_a_row():
    """Property: whatever the shapes, a row has one frame; of equal shapes it is the bucket nearest to them."""
    rng = random.Random(0)
    framing = Framing(512, 64)
    for _ in range(50):
        shapes = [(rng.randint(600, 2000), rng.randint(600, 2000)) for _ in range(rng.randint(1, 4))]
        images = [{"type": "image", "image": Image.new("L", shape)} for shape in shapes]
        frame = Framing(512, 64, min_size=1).size(images)
        assert frame in buckets(512, 64)
        assert frame == Framing(512, 64, min_size=1).size(images[::-1])
    wide = {"type": "image", "image": Image.new("L", (1600, 1000))}
    assert framing.size([wide, wide]) == (384, 640) and Framing(512).size([wide, wide]) == (512, 512)


def test_small_images_are_refused_or_enlarged_as_asked(tmp_path):
    small = saved(tmp_path, Image.fromarray(pixels(24, 40)))
    with pytest.raises(BadRow, match="a.png: it has 40 x 24 pixels, less than the 32 x 32 it is used at; data.min_size=N"):
        Framing(32).size([small])
    with pytest.raises(BadRow, match="it has 40 x 24 pixels, and data.min_size is 25"):
        Framing(32, min_size=25).size([small])
    assert Framing(32, min_size=24).size([small]) == (32, 32)
    counts = pictures.Counter()
    pictures.count_notes([small, small], (32, 32), counts)
    assert counts["enlarged"] == 2
    with pytest.raises(BadRow, match="it has 20 x 12 pixels"):  # what an operation leaves of it
        Framing(16).size([{**small, "ops": ["crop:0.5"]}])


def test_buckets_that_do_not_fit_the_model():
    with pytest.raises(UserError, match="data.buckets=60 does not divide the model's resolution of 512"):
        Framing.of(DataConfig(name="x", source="files", buckets=60), 512)


def test_prepare_cuts_the_middle():
    given = pixels(32, 48, seed=5)
    out, sizes = prepare(Image.fromarray(given), (32, 32))
    assert out.shape == (3, 32, 32) and out.dtype == torch.float32 and sizes == (32, 48, 0, 8)
    torch.testing.assert_close(out, torch.from_numpy(given[:, 8:40].copy()).permute(2, 0, 1).float() / 127.5 - 1)
    tall, sizes = prepare(Image.fromarray(pixels(201, 64)), (32, 32))
    assert tall.shape == (3, 32, 32) and sizes == (201, 64, 34, 0)
    enlarged, sizes = prepare(Image.fromarray(pixels(16, 16)), (32, 64))
    assert enlarged.shape == (3, 32, 64) and sizes == (16, 16, 16, 0) and -1 <= enlarged.min() < enlarged.max() <= 1


def test_a_flip_mirrors_what_is_cut():
    image = Image.fromarray(pixels(64, 100, seed=6))
    plain, mirrored = prepare(image, (32, 32))[0], prepare(image, (32, 32), flip=True)[0]
    torch.testing.assert_close(mirrored, plain.flip(-1), atol=0.02, rtol=0)
    assert (mirrored - plain).abs().max() > 0.5


# ---- rows ----------------------------------------------------------------------------------------------


def row(**columns):
    return parse_row({"prompt": "a fox", **columns}, COLUMNS, "here")


def test_identical_images_are_no_pair(tmp_path):
    a = saved(tmp_path, Image.fromarray(pixels()), "a.png")["path"]
    b = saved(tmp_path, Image.fromarray(pixels()), "b.png")["path"]
    c = saved(tmp_path, Image.fromarray(pixels(seed=1)), "c.png")["path"]
    check_row(row(chosen={"image": a}, rejected={"image": c}))
    check_row(row(chosen={"image": a}, rejected={"image": b, "ops": ["blur:2"]}))
    check_row(row(chosen={"image": a}, rejected={"image": b, "caption": "a wolf"}))
    with pytest.raises(BadRow, match=r"chosen and rejected are the same image .*a\.png and .*b\.png have the same bytes"):
        check_row(row(chosen={"image": a}, rejected={"image": b}))
    with pytest.raises(BadRow, match="the best and the worst completion are the same image"):
        check_row(row(completions=[{"image": a}, {"image": c}, {"image": b}], scores=[3, 2, 1]))
    with pytest.raises(BadRow, match="no such file"):
        check_row(row(chosen={"image": a}, rejected={"image": str(tmp_path / "gone.png")}))
    with pytest.raises(BadRow, match="no operation 'bend'"):
        check_row(row(completion={"image": a, "ops": ["bend"]}))
