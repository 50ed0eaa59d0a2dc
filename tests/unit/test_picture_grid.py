"""Pictures on sheets, in the pages of runs, and on their way to trackers."""

from __future__ import annotations

import base64
import io
import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prefopt.report.alarms import alarms, checked
from prefopt.report.compare import compare
from prefopt.report.picture_grid import LARGEST, MARGIN, SMALLEST, data_uri, over_training, sheet
from prefopt.report.run_report import write_report
from prefopt.tracking.tensorboard_tracker import TensorboardTracker
from prefopt.tracking.tracker import JsonlTracker
from prefopt.training.loop import Log, sample_table
from tests.unit.test_compare import edit
from tests.unit.test_compare import make_run as compared_run
from tests.unit.test_report import Tags, make_run, read_lines, write_lines
from tests.unit.test_tensorboard import read

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def colour(*rgb: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, rgb)


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def picture_run(folder, prompts: int = 6, evaluations: int = 5):
    """A run whose samples are pictures: prompt i is of its own colour and becomes lighter from evaluation to evaluation."""
    make_run(folder, steps=20, prompts=prompts)
    rows, rng = [], random.Random(0)
    steps = [round(20 * k / (evaluations - 1)) for k in range(evaluations)]
    for k, step in enumerate(steps):
        for i in range(prompts):
            name = f"samples/step-{step:06d}/{i:04d}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            colour(30 * i, 60 + 30 * k, 90).save(folder / name)
            rows.append({"step": step, "id": i, "prompt": f"a picture number {i}", "completion": "", "tokens": 1, "finished": True,
                         "reward": round(k * (0.1 + 0.1 * i) + rng.random() * 0.01, 3), "image": name})  # fmt: skip
    write_lines(folder / "samples.jsonl", rows)
    rows = [{k: v for k, v in row.items() if k not in ("length", "finished")} for row in read_lines(folder / "metrics.jsonl")]
    write_lines(folder / "metrics.jsonl", rows)
    return folder


@pytest.fixture
def run(tmp_path):
    return picture_run(tmp_path / "run")


def sources(html: str) -> list[str]:
    return [attributes["src"] for tag, attributes in Tags(html).tags if tag == "img"]


# ---- sheets --------------------------------------------------------------------------------------


def test_a_sheet_shows_every_picture_where_it_belongs():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    rows = [(name, [("", colour(*c))]) for name, c in zip(["one", "two", "three", "four", "five"], colours, strict=True)]
    drawn = np.asarray(sheet(rows, 3))
    found = {c: np.argwhere((drawn == c).all(-1)) for c in colours}
    tops = [found[c].min(0)[0] for c in colours]
    lefts = [found[c].min(0)[1] for c in colours]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2]
    for c in colours:
        assert len(found[c]) == SMALLEST**2, "enlarged by a whole factor, each pixel as a square"
        below = drawn[found[c].max(0)[0] + 1 :][:20, found[c].min(0)[1] : found[c].max(0)[1]]
        assert (below < 128).any(), "a caption stands below"


def test_sheets_of_odd_contents():
    wide = sheet([("word " * 200, [("", colour(9, 9, 9, size=(400, 200)))]), ("", [("", colour(1, 2, 3, size=(100, 300)))])])
    assert wide.width == 2 * (400 + 2 * MARGIN) and wide.height < 450, "a long caption is cut"
    assert sheet([("Füchse, 狐, \n\tfox " + "x" * 500, [("", colour(0, 0, 0).convert("L"))])], 1).mode == "RGB"
    one = [("same", [("before", colour(0, 0, 0)), ("after", colour(9, 9, 9))])]
    assert sheet(one).tobytes() == sheet(one).tobytes()
    for rows, columns in (([], 1), ([("a", [])], 1), (one, 0)):
        with pytest.raises(ValueError, match="a sheet needs"):
            sheet(rows, columns)


def test_a_row_is_shown_side_by_side_with_names():
    drawn = np.asarray(sheet([("a caption", [("before", colour(250, 0, 0)), ("after", colour(0, 250, 0))])], 1))
    before, after = (np.argwhere((drawn == c).all(-1)) for c in ((250, 0, 0), (0, 250, 0)))
    assert before.min(0)[0] == after.min(0)[0] and before.max(0)[1] < after.min(0)[1]
    for place in (before, after):
        assert (drawn[: place.min(0)[0], place.min(0)[1] : place.max(0)[1]] < 150).any(), "a name stands above"


# ---- pictures in a page --------------------------------------------------------------------------


def test_a_picture_is_embedded_whole_and_not_too_large(tmp_path):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 20, 3), dtype=np.uint8))
    small.save(tmp_path / "small.png")
    found = decoded(data_uri(tmp_path, "small.png"))
    assert found.size == (100, 160) and found.format == "PNG"
    assert np.array_equal(np.asarray(found)[::5, ::5], np.asarray(small)), "small pictures lose nothing"
    colour(200, 100, 50, size=(900, 600)).save(tmp_path / "large.png")
    found = decoded(data_uri(tmp_path, "large.png"))
    assert max(found.size) == LARGEST and found.format == "JPEG"
    assert np.abs(np.asarray(found, dtype=int) - [200, 100, 50]).max() <= 4


def test_nothing_outside_the_run_and_nothing_broken_is_embedded(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    colour(1, 1, 1).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "broken.png").write_bytes(b"no picture")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "broken.png", "missing.png", "", ".", "a\0b"):
        assert data_uri(folder, name) == "", name


def test_the_page_shows_before_after_and_the_way_between(run):
    html = write_report(run).read_text(encoding="utf-8")
    tags = Tags(html)
    assert not tags.stack
    found = sources(html)
    assert all(source.startswith("data:image/png;base64,") for source in found)
    # Twelve in pairs, two extremes in pairs (every reward rose: only a largest gain), four prompts at five evaluations.
    assert len(found) == 6 * 2 + 1 * 2 + 4 * 5
    first = [tuple(np.asarray(decoded(source))[0, 0]) for source in found]
    assert first[:2] == [(150, 60, 90), (150, 180, 90)], "the largest gain is that of the last prompt: before and after"
    assert first[2:4] == [(0, 60, 90), (0, 180, 90)]
    assert first[14:19] == [(0, 60 + 30 * k, 90) for k in range(5)], "the first prompt over training"
    text = tags.text
    for words in ("Pictures for the same held-out prompts at step 0 (before) and step 20 (after)", "Over training", "a picture number 3",
                  "No picture lost reward", "The pictures that the model makes"):
        assert words in text, words
    for words in ("Reply length (", "length growth", "unfinished replies", "tokens</span>", "(empty reply)"):
        assert words not in html, words
    assert "img-src data:" in html and "default-src 'none'" in html
    assert write_report(run).read_text(encoding="utf-8") == html


def test_the_reward_of_a_scorer_is_shown(run):
    rows = read_lines(run / "metrics.jsonl")
    assert "Mean reward of samples by the chosen scorer" not in write_report(run).read_text(encoding="utf-8")
    for row in rows:
        if row["split"] == "eval":
            row |= {"reward": 20 + row["step"] / 10, "reward_low": 19.0, "reward_high": 23.0}
    write_lines(run / "metrics.jsonl", rows)
    text = Tags(write_report(run).read_text(encoding="utf-8")).text
    assert "Mean reward of samples by the chosen scorer" in text and "20.00 → 22.00" in text


def test_captions_and_file_names_are_escaped(run):
    rows = [row | {"prompt": EVIL, "image": EVIL if row["id"] == 1 else row["image"]} for row in read_lines(run / "samples.jsonl")]
    write_lines(run / "samples.jsonl", rows)
    tags = Tags(write_report(run).read_text(encoding="utf-8"))
    assert "script" not in [tag for tag, _ in tags.tags] and not tags.stack
    for tag, attributes in tags.tags:
        if tag == "img":
            assert set(attributes) == {"src", "alt"} and attributes["src"].startswith("data:image/")
            assert attributes["alt"] == EVIL
    assert f"({EVIL} is missing or no picture)" in tags.text


def test_a_missing_picture_costs_its_own_place(run):
    (run / "samples" / "step-000020" / "0002.png").unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert "(samples/step-000020/0002.png is missing or no picture)" in Tags(html).text
    assert len(sources(html)) == 6 * 2 + 2 + 4 * 5 - 2  # in its pair and in its strip


def test_the_way_is_shown_from_three_evaluations_on_and_by_six_at_most():
    def steps(count: int) -> dict:
        return {10.0 * k: {i: {"prompt": "p", "image": f"{k}-{i}.png", "reward": k} for i in range(9)} for k in range(count)}

    assert over_training(steps(2)) == []
    assert over_training({k: {0: {"prompt": "p", "completion": "text"}} for k in range(5)}) == []
    for count in (3, 6, 7, 40):
        strips = over_training(steps(count))
        assert [s["id"] for s in strips] == [0, 1, 2, 3]
        shown = [cell["step"] for cell in strips[0]["cells"]]
        assert shown[0] == 0 and shown[-1] == 10 * (count - 1) and len(set(shown)) == len(shown) == min(count, 6)
    partly = steps(4)
    del partly[10.0][2]
    assert [len(s["cells"]) for s in over_training(partly)] == [4, 4, 3, 4]


def test_text_runs_have_no_trace_of_pictures(tmp_path):
    html = write_report(make_run(tmp_path / "run", steps=20, prompts=8)).read_text(encoding="utf-8")
    assert not sources(html) and "Over training" not in html and 'class="pictures"' not in html
    assert "Replies to the same held-out prompts" in html and "length growth" in html


# ---- everything else that reads such runs --------------------------------------------------------


def test_alarms_of_texts_are_not_about_pictures(run):
    rows = read_lines(run / "metrics.jsonl")
    of_texts = {"length growth", "unfinished replies"}
    assert of_texts <= {name for name, _ in checked(rows)} and not of_texts & {name for name, _ in checked(rows, pictures=True)}
    of_pictures = {"reward hacking"}
    assert {name for name, _ in checked(rows)} - of_texts == {name for name, _ in checked(rows, pictures=True)} - of_pictures
    assert of_pictures <= {name for name, _ in checked(rows, pictures=True)} and not of_pictures & {name for name, _ in checked(rows)}
    assert not {alarm.name for alarm in alarms(rows)} & {"length_growth", "unfinished"}


def test_alarms_speak_of_pictures():
    evals = [{"split": "eval", "step": s, "logp/chosen": -100.0 - s, "logp/rejected": -100.0 - 2 * s, "loss": 0.7 + 0.1 * s}
             for s in (0, 9)]
    train = [{"split": "train", "step": s, "loss": 2.0, "pictures": 8 * s} for s in (1, 9)]
    start = [{"split": "check", "step": 0, "policy_minus_reference": 3.0}]
    said = {alarm.name: f"{alarm.title} {alarm.explanation}" for alarm in alarms(evals + train + start)}
    assert {"likelihood_displacement", "collapse", "wrong_reference"} <= said.keys()
    assert said["likelihood_displacement"].startswith("Chosen pictures became less likely")
    for words in said.values():
        assert "picture" in words and not any(word in words for word in ("repl", "token", "language")), words


def test_trackers_are_given_files(run):
    table = sample_table(run)
    assert len(table) == 6 and {row["step"] for row in table} == {20}
    assert table[3]["before"] == run / "samples/step-000000/0003.png" and table[3]["after"] == run / "samples/step-000020/0003.png"
    assert table[3]["after"].is_file() and table[3]["prompt"] == "a picture number 3"


def test_an_evaluation_brings_pictures_to_files_and_trackers(tmp_path):
    """The part of the loop that writes samples, with a judge that gives pictures and the real trackers."""
    judged = {step: [{"step": step, "id": i, "prompt": f"p{i}", "completion": "", "tokens": 0, "finished": True, "reward": 1.0 * step,
                      "image": colour(10 * i, step, 0)} for i in range(3)] for step in (0, 4)}  # fmt: skip
    log = Log.__new__(Log)
    tensorboard, seen = TensorboardTracker(tmp_path, {"algo": {"name": "dpo"}}, 0), []
    recorder = SimpleNamespace(log=lambda row: None, log_samples=seen.append, log_images=lambda *given: seen.append(given))
    log.run = SimpleNamespace(folder=tmp_path, main=True, judge=lambda step: ({"true_reward": 1.0}, judged[step]),
                              moving=SimpleNamespace(averaged=nullcontext),
                              engine=SimpleNamespace(clock=SimpleNamespace(pause=nullcontext)))
    log.cfg = SimpleNamespace(train=SimpleNamespace(keep_best=None))
    log.trackers, log.warned, log.before, log.began = [tensorboard, recorder], set(), 0.0, 0.0
    log.metrics, log.samples = JsonlTracker(tmp_path / "metrics.jsonl"), JsonlTracker(tmp_path / "samples.jsonl")
    log.speed = SimpleNamespace(restart=lambda: None)
    for step in (0, 4):
        log.evaluate(step)
    tensorboard.close("finished")
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [np.asarray(Image.open(tmp_path / row["image"]))[0, 0].tolist() for row in rows] == [
        [10 * i, step, 0] for step in (0, 4) for i in range(3)]
    table, (step, images) = seen[2:]
    assert step == 4 and images == [(f"p{i}", tmp_path / rows[3 + i]["image"]) for i in range(3)]
    for i, row in enumerate(table):
        assert (row["before"], row["after"]) == (tmp_path / rows[i]["image"], tmp_path / rows[3 + i]["image"])
    events = read(tmp_path)
    assert [(e.step, e.width) for e in events.Images("images/2")] == [(0, 32), (4, 32)]


def test_runs_of_pictures_can_be_compared(tmp_path):
    folders = []
    for name, algo, gain in (("one", "dpo", 1.0), ("two", "simpo", 2.0)):
        folders.append(compared_run(tmp_path / name, algo, gain=gain))
        (folders[-1] / "samples").mkdir()
        colour(1, 2, 3).save(folders[-1] / "samples" / "same.png")
        edit(folders[-1], "samples.jsonl", lambda row: {k: v for k, v in row.items() if k not in ("completion", "tokens", "finished")}
             | {"image": "samples/same.png"})
        edit(folders[-1], "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k not in ("length", "finished")})
    text, path = compare(folders, tmp_path / "page.html")
    html = path.read_text(encoding="utf-8")
    assert "Head-to-head win rate" in html and not Tags(html).stack
    assert "simpo" in text and re.search(r"true reward", text, re.IGNORECASE)
