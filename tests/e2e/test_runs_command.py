"""`prefopt runs`: what it says of runs in every state, and what it removes."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.training import checkpoint
from tests.toy_runs import train

BANDIT = ("model=bandit", "data=bandit", "train.save_every=2", "train.keep_checkpoints=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two runs, one of them in a folder below."""
    root = tmp_path_factory.mktemp("made") / "runs"
    assert train(root / "first", *BANDIT) == 0
    assert train(root / "sweep" / "second", *BANDIT, "algo=ipo") == 0
    return root


@pytest.fixture
def runs(made, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "runs"))


def said(capsys, *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["runs", *words]) == code
    out, err = capsys.readouterr()
    return err.splitlines()[-1] if code == 2 else out


def status(run: Path, state: str, age: float = 0.0) -> None:
    file = run / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": state}))
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        os.utime(run / name, (time.time() - age,) * 2)


def test_runs_are_listed_with_what_became_of_them(runs, capsys):
    for words in ((), ("runs",)):  # the folder where runs usually are
        head, *lines, blank, total = said(capsys, "ls", *words).splitlines()
        assert head.split()[:6] == ["run", "algo", "model", "data", "state", "step"] and blank == "" and total.startswith("2 runs, ")
        assert [line.split()[:6] for line in lines] == [["first", "dpo", "bandit", "bandit", "finished", "4/4"],
                                                        ["sweep/second", "ipo", "bandit", "bandit", "finished", "4/4"]]
        assert all("true_reward" in line for line in lines)
    assert len(said(capsys, "ls", "runs/first").splitlines()) == 4


def test_a_run_that_has_been_silent_was_killed(runs, capsys):
    status(runs / "first", "running")
    assert " running " in said(capsys, "ls")
    status(runs / "first", "running", age=3600)
    assert " killed " in said(capsys, "ls")
    (runs / "first" / "status.json").write_text("{")  # cut short by a full disk, say
    (runs / "first" / "config.yaml").write_text("algo: [")
    line = next(line for line in said(capsys, "ls").splitlines() if line.startswith("first"))
    assert line.split()[:6] == ["first", "?", "?", "?", "unknown", "0/?"]


def test_a_run_is_shown(runs, capsys):
    text = said(capsys, "show", "runs/first")
    evaluation = [json.loads(line) for line in (runs / "first" / "metrics.jsonl").read_text().splitlines()]
    reward = [row for row in evaluation if row["split"] == "eval"][-1]["true_reward"]
    for part in ("algo=dpo model=bandit data=bandit seed=0", "finished, step 4 of 4", f"step 4: true_reward {reward:.4g}", "step-000002",
                 "step-000004", "command      prefopt train", str(Path("runs/first/report.html"))):
        assert part in text, part


def test_checkpoints_are_verified(runs, capsys):
    assert said(capsys, "verify", "runs") == "2 runs, 4 checkpoints, all as they were written\n"
    damaged = checkpoint.steps(runs / "first" / "checkpoints")[0]
    with open(damaged / "optimizer.safetensors", "ab") as file:
        file.write(b"x")
    text = said(capsys, "verify", "runs/first", "runs/sweep", code=1)
    assert f"damaged: {damaged.relative_to(runs.parent)} (optimizer.safetensors does not have the checksum" in text
    assert "1 of 4 checkpoints are damaged" in text


def test_runs_are_removed_unless_they_are_going_on(runs, capsys):
    status(runs / "first", "running")
    assert "is running (it wrote something" in said(capsys, "rm", "runs/first", code=2)
    assert checkpoint.steps(runs / "first" / "checkpoints")
    status(runs / "first", "stopped")
    assert "removed runs/first/checkpoints, " in said(capsys, "rm", "--checkpoints", "runs/first")
    assert (runs / "first" / "report.html").is_file() and not (runs / "first" / "checkpoints").exists()
    assert "has no checkpoints" in said(capsys, "rm", "runs/first", "--checkpoints")
    assert "removed runs/sweep/second, " in said(capsys, "rm", "runs/sweep/second")
    assert not (runs / "sweep" / "second").exists()


def test_nothing_is_removed_where_one_of_the_names_is_wrong(runs, capsys):
    assert "runs/secnd is no run" in said(capsys, "rm", "runs/first", "runs/secnd", code=2)
    assert (runs / "first").is_dir()


@pytest.mark.parametrize(("words", "answer"), [
    ((), "prefopt runs is no command of its own"),
    (("list",), "unknown command 'runs list'"),
    (("verfy",), "did you mean 'verify'?"),
    (("ls", "a", "b"), "takes one folder"),
    (("show",), "takes one folder"),
    (("rm",), "takes folders"),
    (("rm", "runs/first", "--all"), "does not know --all"),
    (("ls", "nowhere"), "nowhere: there is no such folder"),
    (("ls", "runs/first/checkpoints"), "holds no run"),
    (("show", "runs/frist"), "did you mean 'first'?"),
    (("rm", "runs"), "runs is no run"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_what_cannot_be_done_is_said(runs, capsys, words, answer):
    assert answer in said(capsys, *words, code=2)
    assert (runs / "first").is_dir()
