"""Encoded images and captions: computed once, by whichever process, found again by every run."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from prefopt import cli
from prefopt.config.schema import DataConfig
from prefopt.data import latents, pictures
from prefopt.data.latents import Encodings, encode
from prefopt.data.pictures import Framing, prepare
from prefopt.data.records import BadRow, parse_row
from prefopt.data.shards import Shards
from prefopt.errors import UserError
from prefopt.evaluation import store as store_command
from prefopt.policies import store
from tests.toy import COLUMNS


class FakeEncoders:
    """Latents are 4 x 4 means of pixels with their red channel twice; an embedding tells the text's length and letters."""

    def __init__(self):
        self.fingerprint = {"vae": "fake-vae", "text": "fake-text"}
        self.images, self.texts, self.freed, self.scale = 0, [], 0, 1.0

    def latents(self, pixels):
        assert pixels.dtype == torch.float32 and pixels.shape[1] == 3
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        mean = torch.cat([mean, mean[:, :1]], 1) * self.scale
        return mean, torch.full_like(mean, 0.25)

    def captions(self, texts):
        self.texts += texts
        return [{"prompt_embeds": torch.full((3, 2), float(len(t)), dtype=torch.bfloat16), "mask": torch.tensor([1, 1, len(t) > 2]),
                 "pooled": torch.tensor([sum(map(ord, t)) / 100])} for t in texts]  # fmt: skip

    def free(self):
        self.freed += 1


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    pictures.forget()
    yield FakeEncoders()
    pictures.forget()


def pixels(seed, height=16, width=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(folder, name, seed, **shape):
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels(seed, **shape)).save(folder / name)
    old = time.time() - 100
    os.utime(folder / name, (old, old))
    return {"image": str(folder / name)}


def pair(folder, i, caption=None, **shape):
    sides = [save(folder, f"{i}{side}.png", 2 * i + n, **shape) for n, side in enumerate("ab")]
    row = {"prompt": caption or f"caption {i % 3}", "chosen": sides[0], "rejected": sides[1]}
    return parse_row(row, COLUMNS, f"rows.jsonl row {i + 1}")


def config(**settings):
    return DataConfig(name="pictures", source="files", pictures=True, **settings)


def run(examples, fake, resolution=16, **settings):
    given = {k: settings.pop(k) for k in ("rank", "world", "wait", "root") if k in settings}
    return encode(examples, config(**settings), resolution, lambda: fake, fingerprint=fake.fingerprint, about="a/model", **given)


def unopened():
    pytest.fail("the encoders were opened")


# ---- what comes out ------------------------------------------------------------------------------------


def test_encodings_are_those_of_the_encoders(tmp_path, fake):
    example = pair(tmp_path / "a", 0)
    made = run([example], fake)
    first, second = made.images_of(example)
    mean, std = made.latent(first)
    live, sizes = prepare(Image.fromarray(pixels(0)), (16, 16))
    want = FakeEncoders().latents(live[None])
    assert torch.equal(mean, want[0][0]) and torch.equal(std, want[1][0]) and mean.dtype == torch.float32
    assert made.sizes(first).tolist() == [16, 24, 0, 4, 16, 16] == [*sizes, 16, 16]
    assert made.image_of(example.completions[1].picture) == second != first and 0 < first < 2**63
    caption = made.caption(made.caption_of("caption 0"))
    assert torch.equal(caption["prompt_embeds"], torch.full((3, 2), 9.0)) and caption["prompt_embeds"].dtype == torch.float32
    assert caption["mask"].tolist() == [1, 1, 1] and caption["mask"].dtype == torch.int64
    assert made.caption(made.caption_of(""))["mask"].tolist() == [1, 1, 0]  # without a caption


def test_captions_are_encoded_once_each(tmp_path, fake):
    run([pair(tmp_path / "a", i) for i in range(9)], fake)
    assert sorted(fake.texts) == ["", "caption 0", "caption 1", "caption 2"] and fake.images == 18 and fake.freed == 2


def test_own_captions_are_encoded_too(tmp_path, fake):
    a = save(tmp_path / "a", "a.png", 0)
    example = parse_row({"prompt": "a fox", "chosen": a, "rejected": {**a, "caption": "a wolf"}}, COLUMNS)
    made = run([example], fake)
    assert fake.images == 1 and sorted(fake.texts) == ["", "a fox", "a wolf"]
    assert made.images_of(example)[0] == made.images_of(example)[1]  # told apart by their captions
    assert made.caption_of("a fox") != made.caption_of("a wolf")


def test_trap_4_20_captions_are_told_apart_as_they_are_written(tmp_path, fake):
    """By capitals, by blanks, and by what no text encoder reads any more."""
    long = "a fox " * 100
    captions = ["A fox", "a fox", "a fox ", long + "at home", long + "away"]
    made = run([pair(tmp_path / "a", i, caption) for i, caption in enumerate(captions)], fake)
    assert len({made.caption_of(caption) for caption in ["", *captions]}) == 6 and sorted(fake.texts) == sorted(["", *captions])


def test_what_is_stored_needs_no_encoder(tmp_path, fake):
    examples = [pair(tmp_path / "a", i) for i in range(4)]
    first = run(examples, fake)
    again = encode(examples, config(), 16, unopened, fingerprint=fake.fingerprint)
    for example in examples:
        for a, b in zip(first.images_of(example), again.images_of(example), strict=True):
            assert a == b and all(torch.equal(x, y) for x, y in zip(first.latent(a), again.latent(b), strict=True))
    more = [*examples, pair(tmp_path / "a", 7, "a new caption")]
    fake.images, fake.texts = 0, []
    run(more, fake)
    assert (fake.images, fake.texts) == (2, ["a new caption"])


def test_the_same_bytes_elsewhere_are_the_same_image(tmp_path, fake):
    run([pair(tmp_path / "a", 0)], fake)
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = parse_row({"prompt": "caption 0", "chosen": {"image": str(tmp_path / "moved" / "0a.png")},
                       "rejected": {"image": str(tmp_path / "moved" / "0b.png")}}, COLUMNS)  # fmt: skip
    assert len(encode([moved], config(), 16, unopened, fingerprint=fake.fingerprint).images_of(moved)) == 2


@pytest.mark.parametrize("what", ["vae", "text", "resolution", "precision", "ops"])
def test_what_entries_depend_on(tmp_path, fake, what):
    example = pair(tmp_path / "a", 0)
    run([example], fake)
    fake.images, fake.texts = 0, []
    if what in fake.fingerprint:
        fake.fingerprint[what] = "another"
    if what == "ops":
        example.completions[0].picture["ops"] = ["blur:2"]
    run([example], fake, resolution=8 if what == "resolution" else 16, latents="fp16" if what == "precision" else "fp32")
    counts = {"vae": (2, 0), "text": (0, 2), "resolution": (2, 0), "precision": (2, 2), "ops": (1, 0)}
    assert (fake.images, len(fake.texts)) == counts[what]


def test_a_changed_image_is_encoded_anew(tmp_path, fake):
    example = pair(tmp_path / "a", 0)
    before = run([example], fake).images_of(example)
    save(tmp_path / "a", "0a.png", 50)
    os.utime(tmp_path / "a" / "0a.png", (time.time() - 50,) * 2)
    after = run([example], fake).images_of(example)
    assert before[0] != after[0] and before[1] == after[1] and fake.images == 3


def test_half_precision_halves_the_room_and_says_when_it_overflows(tmp_path, fake):
    examples = [pair(tmp_path / "a", i) for i in range(8)]
    made = run(examples, fake, latents="fp16")
    exact = run(examples, fake)
    for example in examples:
        for a, b in zip(made.images_of(example), exact.images_of(example), strict=True):
            torch.testing.assert_close(made.latent(a)[0], exact.latent(b)[0], rtol=2**-11, atol=1e-7)
    sizes = {s.identity["precision"]: s.bytes for s in store.scorers(tmp_path / "store" / "latents")}
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.65
    fake.scale = 1e6
    with pytest.raises(UserError, match=r"rows.jsonl row 10: the VAE makes NaN or infinity of .*9a.png in fp16; set data.latents=fp32"):
        run([pair(tmp_path / "a", 9)], fake, latents="fp16")


# ---- rows ----------------------------------------------------------------------------------------------


def test_trap_4_7_all_images_of_a_row_share_bucket_and_flip(tmp_path, fake):
    """A square and a wide image of one pair come to one size; the same image in another row may come to another."""
    square, wide = save(tmp_path, "s.png", 0, height=64, width=64), save(tmp_path, "w.png", 1, height=64, width=192)
    other = save(tmp_path, "o.png", 2, height=64, width=192)
    rows = [parse_row({"prompt": "p", "chosen": a, "rejected": b}, COLUMNS) for a, b in ((square, wide), (wide, other))]
    made = run(rows, fake, resolution=32, buckets=8, flip=True)
    shapes = []
    for example in rows:
        for flip in (False, True):
            found = made.images_of(example, flip)
            shapes.append({tuple(made.latent(image)[0].shape) for image in found})
        plain = made.images_of(example)
        assert [made.mirrored[image] for image in plain] == made.images_of(example, True)
        torch.testing.assert_close(made.latent(made.mirrored[plain[1]])[0], made.latent(plain[1])[0].flip(-1), atol=0.02, rtol=0)
    assert all(len(s) == 1 for s in shapes) and shapes[0] == shapes[1] != shapes[2] == shapes[3]
    assert made.image_of(rows[1].completions[1].picture) == made.images_of(rows[1])[1]
    with pytest.raises(BadRow, match="w.png: it is in several rows, at different sizes"):
        made.image_of(rows[0].completions[1].picture)


def test_some_images_of_a_row_keep_its_size(tmp_path, fake):
    """As where a ranking is reduced to its best and worst image."""
    sides = [save(tmp_path, f"{n}.png", n, height=64, width=width) for n, width in enumerate((64, 192, 192))]
    ranking = parse_row({"prompt": "p", "completions": sides, "scores": [3, 2, 1]}, COLUMNS)
    made = run([ranking], fake, resolution=32, buckets=8)
    for some in ([0, 2], [1, 2], [1]):
        part = replace(ranking, completions=[ranking.completions[i] for i in some])
        assert made.images_of(part) == [made.images_of(ranking)[i] for i in some]


def test_bad_images_are_bad_rows_with_their_reason(tmp_path, fake):
    good, cut, text, small = (pair(tmp_path / "a", i) for i in range(4))
    for name, content in (("1a.png", (tmp_path / "a" / "1a.png").read_bytes()[:300]), ("2b.png", b"text")):
        (tmp_path / "a" / name).write_bytes(content)
    save(tmp_path / "a", "3a.png", 40, height=8)
    made = run([good, cut, text, small], fake)
    assert len(made.images_of(good)) == 2
    for example, reason in ((cut, "1a.png: it is damaged or cut off"), (text, "2b.png: it is no readable image"),
                            (small, "3a.png: it has 24 x 8 pixels, less than")):  # fmt: skip
        for ask in (made.images_of, lambda e: [made.image_of(c.picture) for c in e.completions]):
            with pytest.raises(BadRow, match=reason):
                ask(example)
    unknown = pair(tmp_path / "a", 9, "unknown")
    with pytest.raises(BadRow, match="9a.png: it is not encoded at 16 x 16 pixels"):
        made.images_of(unknown)
    with pytest.raises(BadRow, match="the caption 'unknown' is not encoded"):
        made.caption_of("unknown")


def test_identical_images_in_cells_are_found_when_they_are_read(tmp_path, fake):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = open(save(tmp_path, "a.png", 0)["image"], "rb").read()
    pq.write_table(pa.table({"a": [content], "b": [content]}), tmp_path / "t.parquet")
    sides = [{"image": {"path": str(tmp_path / "t.parquet"), "row": 0, "column": c}} for c in "ab"]
    example = parse_row({"prompt": "p", "chosen": sides[0], "rejected": sides[1]}, COLUMNS)
    with pytest.raises(BadRow, match="chosen and rejected are the same image .*row 1 column a and .*row 1 column b have the same bytes"):
        run([example], fake).images_of(example)


def test_identical_images_in_two_formats_are_found_by_their_latents(tmp_path, fake):
    """Nothing can be learned from such a pair, and no byte of it tells."""
    a, other = save(tmp_path, "a.png", 0), save(tmp_path, "c.png", 1)
    Image.fromarray(pixels(0)).save(tmp_path / "b.bmp")
    b = {"image": str(tmp_path / "b.bmp")}
    table = [{"prompt": "p", "chosen": a, "rejected": b}, {"prompt": "p", "completions": [a, other, b], "scores": [3, 2, 1]},
             {"prompt": "p", "chosen": a, "rejected": {**a, "ops": ["blur:0"]}}, {"prompt": "p", "chosen": a, "rejected": other},
             {"prompt": "p", "chosen": a, "rejected": {**b, "caption": "q"}}]  # fmt: skip
    examples = [parse_row(row, COLUMNS) for row in table]
    for example in examples:
        pictures.check_row(example)
    made = run(examples, fake)
    for example, said in zip(examples, ("chosen and rejected are", "the best and the worst completion are", "chosen and rejected are"),
                             strict=False):
        with pytest.raises(BadRow, match=f"{said} the same image .*a.png and .* come to the same pixels"):
            made.images_of(example)
    for example in examples[3:]:
        assert len(set(made.images_of(example))) == 2


def test_trap_4_12_nan_names_the_row(tmp_path, fake, monkeypatch):
    examples = [pair(tmp_path / "a", i) for i in range(3)]
    monkeypatch.setattr(FakeEncoders, "latents", lambda self, x: (x / (torch.arange(len(x)) != 2)[:, None, None, None], x * 0))
    with pytest.raises(UserError, match=r"rows.jsonl row 2: the VAE makes NaN or infinity of .*1a.png; is the image damaged, or the VAE"):
        run(examples, fake)

    class NotFinite(UserError):
        place = 3

    def refuse(self, x):
        raise NotFinite("NaN of picture 3")

    monkeypatch.setattr(FakeEncoders, "latents", refuse)
    with pytest.raises(UserError, match=r"rows.jsonl row 2: .*1b.png"):
        run(examples, fake)
    monkeypatch.setattr(FakeEncoders, "captions", lambda self, texts: [{"e": torch.tensor([float("inf")])} for _ in texts])
    monkeypatch.setattr(FakeEncoders, "latents", lambda self, x: (x, x * 0))
    with pytest.raises(UserError, match="the text encoders make NaN or infinity of the caption"):
        run(examples, fake)


def test_an_autoencoder_without_a_deviation(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(FakeEncoders, "latents", lambda self, x: (x, x * 0))
    example = pair(tmp_path / "a", 0)
    made = run([example], fake)
    assert made.latent(made.images_of(example)[0])[1] is None


def test_what_is_added_in_memory():
    made = Encodings(Framing(16), {"vae": "v", "text": "t"}, shape=(4, 4, 4))
    made.add_latent(7, torch.ones(4, 4, 4))
    mean, std = made.latent(7)
    assert torch.equal(mean, torch.ones(4, 4, 4)) and std is None and made.shape == (4, 4, 4)
    assert made.sizes(7).tolist() == [16, 16, 0, 0, 16, 16] and made.default_sizes(3).shape == (3, 6)
    caption = made.add_caption("new", {"e": torch.ones(2)})
    assert made.caption_of("new") == caption and torch.equal(made.caption(caption)["e"], torch.ones(2))


# ---- processes, runs, kills ----------------------------------------------------------------------------


def test_processes_share_the_work(tmp_path, fake, monkeypatch):
    """Four processes one after the other, the last of them alone able to wait for the rest: each encodes its share, together all."""
    monkeypatch.setattr(latents, "CHUNK", 4)
    examples = [pair(tmp_path / "a", i) for i in range(16)]
    (tmp_path / "a" / "5a.png").write_bytes(b"broken")
    shares = []
    for rank in range(4):
        one = FakeEncoders()
        monkeypatch.setattr(latents, "_fill", _first_only(latents._fill))
        run(examples, one, rank=rank, world=4)
        monkeypatch.undo()
        monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
        monkeypatch.setattr(latents, "CHUNK", 4)
        shares.append(one.images)
    assert sum(shares) == 30 and max(shares) <= 8  # the row with the broken image is not encoded
    made = encode(examples, config(), 16, unopened, fingerprint=fake.fingerprint, rank=2, world=4)
    assert all(len(made.images_of(e)) == 2 for i, e in enumerate(examples) if i != 5)


def _first_only(real):
    """`_fill` as a process does it that waits for the others: it does not meet what they have left."""
    def fill(out, shards, wanted, entries, encoders, unit, *place):
        if place:
            real(out, shards, wanted, entries, encoders, unit, *place)

    return fill


def test_two_runs_fill_one_store(tmp_path, fake, monkeypatch):
    """At the same time: each finds what the other has written, and both end with everything."""
    monkeypatch.setattr(latents, "CHUNK", 2)
    monkeypatch.setattr(latents, "SHARD_BYTES", 1)
    examples, together = [pair(tmp_path / "a", i) for i in range(12)], threading.Barrier(2)

    class Slow(FakeEncoders):
        def latents(self, x):
            if not self.images:
                together.wait(60)
            return super().latents(x)

    both, made = [Slow(), Slow()], {}
    threads = [threading.Thread(target=lambda n=n: made.update({n: run(examples, both[n])})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [[one.images_of(e) for e in examples] for one in made.values()]
    assert found[0] == found[1] and len({image for row in found[0] for image in row}) == 24
    assert 24 <= both[0].images + both[1].images < 48
    assert store.verify(tmp_path / "store" / "latents")[1] == []


def test_a_killed_run_leaves_its_finished_shards(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 4)
    monkeypatch.setattr(latents, "SHARD_BYTES", 1)
    examples = [pair(tmp_path / "a", i) for i in range(8)]
    real = FakeEncoders.latents

    def dies(self, x):
        if self.images >= 8:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(FakeEncoders, "latents", dies)
    with pytest.raises(KeyboardInterrupt):
        run(examples, fake)
    monkeypatch.setattr(FakeEncoders, "latents", real)
    again = FakeEncoders()
    run(examples, again)
    assert again.images == 16 - 8


def test_it_is_said_what_will_be_written_and_refused_if_there_is_no_room(tmp_path, fake, monkeypatch, capsys):
    run([pair(tmp_path / "a", 0)], fake)
    said = capsys.readouterr().err
    assert "encoding 2 images: about 1.1 kB in" in said and "images: 2 (0 were stored), captions: 2 (0 were stored)" in said
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="encoded images take about 1.1 kB, and .* has 0.1 kB left; set PREFOPT_STORE"):
        run([pair(tmp_path / "a", 1)], fake)


def test_what_was_done_to_images_is_counted(tmp_path, fake, capsys):
    rgba = np.dstack([pixels(3), np.full((16, 24), 100, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    sides = {"chosen": {"image": str(tmp_path / "rgba.png")}, "rejected": save(tmp_path, "small.png", 1, height=12)}
    run([parse_row({"prompt": "p", **sides}, COLUMNS)], fake, min_size=8)
    assert "1 laid on white (alpha), 1 enlarged" in capsys.readouterr().err


# ---- the store -----------------------------------------------------------------------------------------


def test_shards_keep_entries_of_several_shapes(tmp_path):
    shards = Shards(tmp_path, {"a": 1})
    entries = {bytes([i]) * 16: {"x": np.full((2, 1 + i % 2), i, np.float32), "m": np.array(i)} for i in range(5)}
    shards.add(entries)
    again = Shards(tmp_path, {"a": 1})
    again.refresh()
    for key, entry in entries.items():
        assert key in again and all(np.array_equal(again.get(key)[name], array) for name, array in entry.items())
    assert len(store.shards(tmp_path)) == 2 and bytes(16) in again and b"x" * 16 not in again


@pytest.mark.parametrize("how", ["cut", "header", "empty"])
def test_a_damaged_shard_is_no_entry(tmp_path, fake, how):
    example = pair(tmp_path / "a", 0)
    run([example], fake)
    (shard,) = store.shards(tmp_path / "store" / "latents")
    content = shard.read_bytes()
    shard.write_bytes({"cut": content[:-40], "header": b"\xff" * 20 + content[20:], "empty": b""}[how])
    with pytest.raises(UserError, match=r"is damaged; `prefopt store gc` removes damaged shards"):
        run([example], fake)
    assert cli.main(["store", "verify"]) == 1 and cli.main(["store", "gc"]) == 0
    run([example], fake)
    assert fake.images == 4


def test_the_store_command_sees_encodings(tmp_path, fake, capsys):
    run([pair(tmp_path / "a", i) for i in range(3)], fake)
    capsys.readouterr()
    assert cli.main(["store", "ls"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [line[:5] for line in lines if line[0] in ("latents", "captions")] == [
        [kind, "model", "precision", "entries", "shards"] for kind in ("latents", "captions")]  # fmt: skip
    assert [line[1:5] for line in lines if line[1] == "a/model"] == [["a/model", "fp32", "6", "1"], ["a/model", "fp32", "4", "1"]]
    assert cli.main(["store", "verify"]) == 0 and "2 shards, all as they were written" in capsys.readouterr().out
    assert cli.main(["store", "gc"]) == 0 and len(store.shards(tmp_path / "store" / "latents")) == 1
    assert cli.main(["store", "gc", "--limit-gb", "0"]) == 0
    assert not store.shards(tmp_path / "store" / "latents") and not store.shards(tmp_path / "store" / "captions")
    assert set(store_command.KINDS) == {"reference", "latents", "captions"}


def test_encodings_in_use_are_marked_as_such(tmp_path, fake):
    example = pair(tmp_path / "a", 0)
    made = run([example], fake)
    (shard,) = store.shards(tmp_path / "store" / "latents")
    os.utime(shard, (1, 1))
    encode([example], config(), 16, unopened, fingerprint=fake.fingerprint)
    assert shard.stat().st_mtime > time.time() - 100
    shard.unlink()
    assert made.latent(made.images_of(example)[0])[0].shape == (4, 4, 4)  # what is mapped stays readable


def test_a_store_that_cannot_be_written(tmp_path, fake, monkeypatch):
    def refuse(path, content):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("prefopt.data.shards.write_aside", refuse)
    with pytest.raises(UserError, match="cannot be written .Read-only file system.; set PREFOPT_STORE"):
        run([pair(tmp_path / "a", 0)], fake)


def test_arrays_come_back_as_they_were_however_they_lay_in_memory(tmp_path):
    """Convolutions on some processors leave their channels last."""
    shards = Shards(tmp_path, {"a": 1})
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    shards.add({b"k" * 16: {"mean": array}})
    again = Shards(tmp_path, {"a": 1})
    again.refresh()
    assert np.array_equal(again.get(b"k" * 16)["mean"], array)
