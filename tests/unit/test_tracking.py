import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefopt.errors import UserError
from prefopt.tracking.redact import REDACTED, is_secret_name, redact
from prefopt.tracking.tracker import JsonlTracker, read_jsonl
from prefopt.tracking.trackers import Guarded, check_trackers
from prefopt.tracking.wandb_tracker import make_wandb, wandb_labels

HEX40 = "0123456789abcdef0123456789abcdef01234567"
HF = "hf_" + "AbCdEfGhIj" * 3


# --- the local record


def test_rows_are_valid_json_whatever_the_numbers(tmp_path):
    import numpy as np

    tracker = JsonlTracker(tmp_path / "deep" / "metrics.jsonl")
    numbers = [math.inf, 2.0, np.float32("nan")]
    tracker.log({"step": 1, "loss": math.nan, "all": numbers, "x": np.float32(0.5)})
    # Before close: what is logged is on disk.
    lines = (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": None, "all": [None, 2.0, None], "x": 0.5}
    tracker.close()


def test_a_resumed_run_neither_loses_nor_doubles_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 6):
        tracker.log({"step": step, "loss": step / 2})
        tracker.log({"step": step, "split": "eval", "loss": step})
    tracker.close()
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')

    tracker = JsonlTracker(path)
    tracker.truncate_after(3)
    tracker.log({"step": 4, "loss": 2.0})
    tracker.close()
    assert [r["step"] for r in read_jsonl(path)] == [1, 1, 2, 2, 3, 3, 4]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"step": 2, "t": "\xc3'])
def test_only_a_last_line_may_be_broken(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert read_jsonl(path) == [{"step": 1}]
    # Appending never glues a row to the broken one.
    tracker = JsonlTracker(path)
    tracker.log({"step": 3})
    tracker.close()
    assert [r["step"] for r in read_jsonl(path)] == [1, 3]

    path.write_bytes(b'{"step": 1}\n' + tail + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)


def test_a_row_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    tracker = JsonlTracker(path)
    tracker.log({"step": 3})
    tracker.close()
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]
    assert read_jsonl(tmp_path / "missing.jsonl") == []


# --- secrets


def test_secret_names():
    for name in ("hf_token", "token", "apiKey", "WANDB_API_KEY", "reward.openai_api_key", "db_password"):
        assert is_secret_name(name), name
    for name in ("max_new_tokens", "pad_token", "eos_token_id", "token_budget", "tokenizer", "key", "monkey"):
        assert not is_secret_name(name), name


def test_redact_takes_secrets_and_leaves_the_rest(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_TOKEN", "plain-looking-value")
    config = {
        "model": {"path": "x/y", "revision": HEX40, "hf_token": "abc", "pad_token": "<pad>", "token": None},
        "password": 98765,
        "headers": {"Authorization": "Bearer abc"},
        "credentials": {"user": "u", "word": "w"},
        "note": f"use {HF} or sk-proj-abcdefghijklmnop",
        "id": HEX40,
        "cache": f"/hub/snapshots/{HEX40}/a",
        "url": "https://me:pw@host/x?token=abc&n=1",
        "judge": ["say plain-looking-value twice"],
        "argv": ["--token", "abc", "reward.api_key=abc", "+x={password:abc}", f"rev.commit={HEX40}", "lr=1"],
        "algo": {"beta": 0.1, "max_tokens": 512, "use_auth_token": True, "end_of_turn_token": "<|end|>"},
        "path": Path("a/b"),
    }
    out = redact(config)
    text = json.dumps(out)
    for secret in ('"abc"', "=abc", ":abc", "98765", '"w"', HF, "sk-proj", "me:pw", "plain-looking-value"):
        assert secret not in text, secret
    assert out["model"] == config["model"] | {"hf_token": REDACTED}
    assert out["algo"] == config["algo"]
    assert out["id"] == REDACTED and out["cache"] == config["cache"] and out["path"] == "a/b"
    assert out["argv"] == [
        "--token", REDACTED, f"reward.api_key={REDACTED}", f"+x={{password:{REDACTED}}}",
        f"rev.commit={HEX40}", "lr=1",
    ]  # fmt: skip
    assert out["url"] == f"https://{REDACTED}@host/x?token={REDACTED}&n=1"


# --- W&B


@pytest.fixture
def wandb_env(tmp_path, monkeypatch):
    """A client that knows nothing of this machine's user and writes nothing outside tmp_path."""
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "HOME" / ".netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # wandb_reader
    import wandb

    wandb.teardown()  # the client reads the environment once per session
    yield tmp_path / "run"
    wandb.teardown()


def settings(mode, **changes):
    return SimpleNamespace(**{"mode": mode, "project": "p", "entity": None, "init_timeout": 5.0, "tensorboard": False, **changes})


def history(run_dir):
    """The rows of all segments of the run, in the order they were written."""
    import wandb
    from wandb_reader import history

    wandb.teardown()  # waits for the client's process, which writes the end of a file after finish() returns
    return [row for file in sorted(run_dir.glob("wandb/*/*.wandb"), key=lambda f: f.stat().st_mtime_ns) for row in history(file)]


def test_offline_run_is_written_and_read_back(wandb_env, monkeypatch, capfd):
    from wandb_reader import records

    run_dir = wandb_env
    secret, in_env = "sk-argv-" + "s3cr3t" * 4, "envs3cr3tvalue"
    monkeypatch.setattr(sys, "argv", ["prefopt", "train", f"reward.api_key={secret}", "--token", "zzTop99"])
    monkeypatch.setenv("JUDGE_TOKEN", in_env)
    monkeypatch.setenv("WANDB_API_KEY", HEX40)
    report = run_dir.parent / "report.html"
    report.write_text("<!doctype html><p>the report</p>")
    config = {"algo": {"beta": 0.1}, "hub_token": HF, "note": f"key {secret} {in_env}"}

    tracker = make_wandb(settings("offline"), run_dir, config, group="sweep", name=f"beta=0.1,token={HF}")
    tracker.log({"step": 1, "loss": 0.7, "rewards/margin": 1.5, "note": "words stay local", "none": None})
    tracker.log({"step": 1, "split": "eval", "win_rate": 0.25})
    tracker.log({"step": 2, "loss": math.nan})
    tracker.log_samples([{"id": 0, "step": 2, "prompt": "p?", "before": "a", "after": "b", "reward": 1.0}])
    tracker.log_report(report)
    tracker.close("finished")

    rows = {r["_step"]: r for r in history(run_dir)}
    assert sorted(rows) == [1, 2] and all(r["step"] == s for s, r in rows.items())
    assert rows[1]["train/loss"] == 0.7 and rows[1]["train/rewards/margin"] == 1.5
    assert rows[1]["eval/win_rate"] == 0.25 and "train/note" not in rows[1]
    assert rows[2]["train/loss"] in ("NaN", None) or math.isnan(rows[2]["train/loss"])
    files = tracker.folder / "files"
    table = json.loads((files / rows[2]["samples.path"]).read_text())
    assert table["columns"] == ["step", "prompt", "before", "after", "reward"]
    assert table["data"] == [[2, "p?", "a", "b", 1.0]]
    assert (files / rows[2]["report.path"]).read_text() == report.read_text()

    found = list(records(next(tracker.folder.glob("*.wandb"))))
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    kept = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert kept["algo"] == {"beta": 0.1} and kept["hub_token"] == REDACTED
    assert (run.project, run.run_group, run.display_name) == ("p", "sweep", f"beta=0.1,token={REDACTED}")
    assert not run.host

    assert [p for p in (run_dir / "wandb").iterdir()] == [tracker.folder]  # no links to the latest run
    blob = b"".join(p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    blob += b"".join(r.SerializeToString() for r in found)  # a secret may lie across two blocks of the file
    for text in (secret, in_env, HF, HEX40, "zzTop99"):
        assert text.encode() not in blob, text
    out = capfd.readouterr()
    assert out.out == out.err == ""
    for untouched in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR"):
        assert not list((run_dir.parent / untouched).iterdir())


def test_a_resumed_run_keeps_its_id_and_its_steps(wandb_env):
    ids = []
    for first in (1, 3):
        tracker = make_wandb(settings("offline"), wandb_env, {}, group=None, name="n")
        for step in (first, first + 1):
            tracker.log({"step": step, "loss": float(step)})
        ids.append(tracker.run.id)
        tracker.close("finished")
    assert ids[0] == ids[1] == (wandb_env / "wandb_id.txt").read_text().strip()
    assert [r["_step"] for r in history(wandb_env)] == [1, 2, 3, 4]
    assert [r["train/loss"] for r in history(wandb_env)] == [1, 2, 3, 4]


def test_what_an_earlier_start_has_sent_is_not_sent_again_and_nothing_else_is_lost(wandb_env):
    first = make_wandb(settings("offline"), wandb_env, {}, group=None, name="n")
    sent = [{"step": step, "split": "train", "loss": float(step)} for step in (1, 2, 3)]
    for row in sent:
        first.log(row)
    first.close("stopped")
    tracker = make_wandb(settings("offline"), wandb_env, {}, group=None, name="n", rows=sent)
    tracker.log({"step": 3, "loss": 9.0})  # a step that is made again
    tracker.log({"step": 4, "loss": 4.0})
    tracker.log({"step": 3, "split": "eval", "accuracy": 0.5})  # behind W&B's own step, but new
    tracker.log({"step": 5, "loss": 5.0})
    tracker.close("finished")
    rows = history(wandb_env)
    assert [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r] == [(s, s) for s in (1, 2, 3, 4, 5)]
    assert [(r["step"], r["eval/accuracy"]) for r in rows if "eval/accuracy" in r] == [(3, 0.5)]
    assert [r["_step"] for r in rows] == sorted({r["_step"] for r in rows})


def test_rows_are_new_to_a_tracker_that_was_switched_on_later(wandb_env):
    tracker = make_wandb(settings("offline"), wandb_env, {}, group=None, name="n", rows=[{"step": 1, "split": "train"}])
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close("finished")
    assert [r["train/loss"] for r in history(wandb_env)] == [1]


def test_images_are_shown_as_images(wandb_env, tmp_path):
    from PIL import Image
    from wandb_reader import artifact_files

    paths = [tmp_path / "before.png", tmp_path / "after.png"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (8, 8), colour).save(path)
    tracker = make_wandb(settings("offline"), wandb_env, {}, group=None, name="n")
    tracker.log_samples([{"id": 0, "step": 3, "prompt": "p", "before": paths[0], "after": paths[1], "reward": 1.0}])
    tracker.log_images(3, [("p", paths[1])])
    tracker.close("finished")
    (row,) = history(wandb_env)
    files = tracker.folder / "files"
    assert row["images.captions"] == ["p"] and row["step"] == 3
    assert (files / row["images.filenames"][0]).read_bytes() == paths[1].read_bytes()
    table = artifact_files(next(tracker.folder.glob("*.wandb")))
    before, after = json.loads(table["samples.table.json"])["data"][0][2:4]
    assert [table[image["path"]] for image in (before, after)] == [path.read_bytes() for path in paths]


@pytest.mark.parametrize("at", ["log", "log_samples", "log_images", "log_report", "close"])
def test_a_tracker_that_breaks_is_told_of_once_and_left_alone(at, capsys):
    calls = []

    class Breaking:
        name, advice = "Somewhere", "Do this."

        def __getattr__(self, what):
            def call(*args):
                calls.append(what)
                if what == at:
                    raise ConnectionResetError("gone, with token=abc")

            return call

    tracker = Guarded(Breaking())
    for _ in range(2):
        tracker.log({"step": 1})
        tracker.log_samples([])
        tracker.log_images(1, [])
        tracker.log_report(Path("report.html"))
        tracker.close("finished")
    assert calls.count(at) == 1 and calls[-2:] == [at, "abandon"]
    said = f"Somewhere logging has stopped (ConnectionResetError gone, with token={REDACTED}); metrics.jsonl is complete. Do this.\n"
    assert capsys.readouterr().err == said


def test_labels_group_by_method_model_and_seed():
    config = {"algo": {"name": "dpo"}, "model": {"name": "m" * 80}, "data": {"name": "d"}, "seed": 3}
    labels = wandb_labels(config)
    assert labels["job_type"] == "dpo" and labels["tags"][0] == "algo=dpo" and labels["tags"][2:] == ["data=d", "seed=3"]
    assert all(len(tag) <= 64 for tag in labels["tags"])


@pytest.mark.parametrize(("changes", "package"), [({"mode": "offline"}, "wandb"), ({"tensorboard": True}, "tensorboard")])
def test_a_missing_package_is_named_before_anything_is_loaded(changes, package, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    check_trackers(settings("off"))
    with pytest.raises(UserError, match=f"the package '{package}' is not installed; pip install"):
        check_trackers(settings(**{"mode": "off", **changes}))


@pytest.mark.parametrize("key", [None, HEX40])
def test_online_goes_offline_without_key_or_server(wandb_env, monkeypatch, capfd, key):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    # On a terminal the client would ask for a key.
    monkeypatch.setattr("wandb.errors.term._isatty", lambda s: s is not None and s.name != os.devnull)
    tracker = make_wandb(settings("online", init_timeout=1.0), wandb_env, {"a": 1}, group=None, name="n")
    tracker.log({"step": 1, "loss": 0.5})
    tracker.close("finished")
    out = capfd.readouterr()
    assert out.out == "" and out.err.count("\n") == 1
    assert f"wandb sync {tracker.folder.parent}/*run-*-{tracker.run.id}" in out.err
    assert ("No API key" in out.err) == (key is None)
    assert tracker.url is None and [r["train/loss"] for r in history(wandb_env)] == [0.5]
    # The failed attempt leaves nothing behind, the key least of all.
    assert [p.name for p in (wandb_env / "wandb").iterdir()] == [tracker.folder.name]
    assert not any(HEX40.encode() in p.read_bytes() for p in wandb_env.rglob("*") if p.is_file())


def test_off_makes_nothing_and_does_not_import_wandb(tmp_path):
    # A process of its own, because other tests of this one import wandb.
    code = (
        "import sys; from types import SimpleNamespace as N; from pathlib import Path;"
        "from prefopt.tracking.wandb_tracker import make_wandb;"
        "cfg = N(mode='off', project='p', entity=None, init_timeout=1.0);"
        "assert make_wandb(cfg, Path(sys.argv[1]), {}, None, 'n') is None;"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)
    assert not (tmp_path / "run").exists()


def test_an_unknown_mode_is_named(tmp_path):
    with pytest.raises(UserError, match="did you mean 'offline'"):
        make_wandb(settings("ofline"), tmp_path, {}, None, "n")


def test_a_setting_the_client_refuses_is_a_user_error(wandb_env):
    with pytest.raises(UserError, match="Invalid project name 'a/b'"):
        make_wandb(settings("offline", project="a/b"), wandb_env, {}, None, "n")
