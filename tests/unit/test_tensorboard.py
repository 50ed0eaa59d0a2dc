"""TensorBoard's own reader on the event files that were written."""

import logging
import math

import pytest

from prefopt.tracking.tensorboard_tracker import SHOWN, TensorboardTracker
from prefopt.tracking.trackers import Guarded

pytest.importorskip("tensorboard")

CONFIG = {"algo": {"name": "dpo", "beta": 0.1}, "seed": 3, "optim": {"betas": [0.9, 0.999]}, "hub_token": "s3cr3t"}


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "tensors", "images"), 0))
    return events.Reload()


def scalars(events, tag):
    return [(e.step, e.value) for e in events.Scalars(tag)]


def texts(events, tag):
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def fill_disk(tracker):
    """From now on the kernel answers "no space left on device"."""
    tracker._file._writer.close()
    tracker._file._writer = open("/dev/full", "wb", buffering=0)


def test_everything_a_run_sends_is_read_back(tmp_path):
    from PIL import Image

    Image.new("RGB", (6, 4), "red").save(tmp_path / "image.png")
    tracker = TensorboardTracker(tmp_path, CONFIG, 0)
    tracker.log({"step": 1, "split": "train", "loss": 0.5, "note": "words", "none": None, "flag": True})
    tracker.log({"step": 1, "split": "eval", "win_rate": 0.25})
    tracker.log({"step": 2, "split": "train", "loss": math.nan})
    row = {"id": 0, "step": 2, "prompt": "p | q?", "before": "```a", "after": "b\n<b>", "reward": 1.5}
    tracker.log_samples([row, {**row, "id": 1, "before": tmp_path / "image.png", "after": tmp_path / "image.png"}])
    tracker.log_images(2, [("a red one", tmp_path / "image.png")])
    tracker.close("finished")

    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/win_rate"}
    assert scalars(events, "eval/win_rate") == [(1, 0.25)]
    (one, two) = scalars(events, "train/loss")
    assert one == (1, 0.5) and two[0] == 2 and math.isnan(two[1])
    text = texts(events, "samples/0")[2]
    assert all(part in text for part in ("    p | q?", "    ```a", "    b\n    <b>", "    1.5"))
    assert texts(events, "images/0/caption") == {2: "    a red one"} and "samples/1/text_summary" not in events.Tags()["tensors"]
    (image,) = events.Images("images/0")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    assert "| algo.beta | 0.1 |" in texts(events, "config")[0]
    assert set(events.PluginTagToContent("hparams")) == {f"_hparams_/{n}" for n in ("experiment", "session_start_info", "session_end_info")}
    assert b"s3cr3t" not in b"".join(f.read_bytes() for f in tmp_path.iterdir())


def test_a_resumed_run_has_every_step_once(tmp_path):
    first = TensorboardTracker(tmp_path, CONFIG, 0)
    for step in range(1, 8):
        first.log({"step": step, "split": "train", "loss": float(step)})  # on disk at once: the run is killed here
    again = TensorboardTracker(tmp_path, CONFIG, 5)
    for step in range(6, 9):
        again.log({"step": step, "split": "train", "loss": step + 0.5})
    again.close("finished")
    assert scalars(read(tmp_path), "train/loss") == [(s, s if s <= 5 else s + 0.5) for s in range(1, 9)]


def test_a_run_that_starts_anew_in_its_folder_leaves_no_old_steps(tmp_path):
    for value in (1.0, 2.0):
        tracker = TensorboardTracker(tmp_path, CONFIG, 0)
        tracker.log({"step": 0, "split": "eval", "loss": value})
        tracker.close("failed")
    assert scalars(read(tmp_path), "eval/loss") == [(0, 2.0)]


def test_only_so_many_samples_become_panels(tmp_path):
    tracker = TensorboardTracker(tmp_path, {}, 0)
    tracker.log_samples([{"id": i, "step": 1, "prompt": "p", "before": None, "after": "a", "reward": None} for i in range(SHOWN + 4)])
    tracker.close("finished")
    assert sum(tag.startswith("samples/") for tag in read(tmp_path).Tags()["tensors"]) == SHOWN


def test_a_full_disk_does_not_stop_the_run(tmp_path, capsys):
    inner = TensorboardTracker(tmp_path, {}, 0)
    tracker = Guarded(inner)
    tracker.log({"step": 1, "loss": 1.0})
    fill_disk(inner)
    for step in (2, 3, 4):
        tracker.log({"step": step, "loss": 1.0})
    tracker.close("finished")
    assert capsys.readouterr().err.count("TensorBoard logging has stopped (OSError [Errno 28]") == 1
    assert scalars(read(tmp_path), "train/loss") == [(1, 1.0)]
