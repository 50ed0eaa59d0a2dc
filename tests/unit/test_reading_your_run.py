"""docs/reading-your-run.md and the alarms: links lead somewhere, commands compose, and on real runs alarms fire where they should and
nowhere else. The rows are those that runs on the tiny world wrote (docs/reading-your-run.json)."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from prefopt.config.compose import typed
from prefopt.report.alarms import GUIDE, alarms
from prefopt.tracking.tracker import read_jsonl
from tests.toy_runs import train
from tests.unit.test_compose import composed

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reading-your-run.md"
RUNS = json.loads((ROOT / "docs" / "reading-your-run.json").read_text(encoding="utf-8"))["runs"]


def script():
    spec = importlib.util.spec_from_file_location("reading_your_run", ROOT / "scripts" / "reading_your_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raised(name: str, rows: list[dict] | None = None) -> set[str]:
    return {alarm.name for alarm in alarms(RUNS[name]["rows"] if rows is None else rows)}


def raised_on_the_way(name: str) -> set[str]:
    """By any evaluation, as the training loop asks."""
    rows = RUNS[name]["rows"]
    steps = [row["step"] for row in rows if row["split"] == "eval"]
    return set().union(*(raised(name, [row for row in rows if row["step"] <= step]) for step in steps))


SICK = {
    "displacement": "likelihood_displacement",
    "length": "length_growth",
    "over-optimisation": "over_optimisation",
    "wrong-reference": "wrong_reference",
    "learning-rate": "collapse",
}
# Sound settings. In some of these runs chosen replies did become less likely, and the alarm is right to say so.
DISPLACED = ["dpo-default", "kto", "simpo"]
QUIET = sorted(RUNS.keys() - SICK.keys() - set(DISPLACED))


@pytest.mark.parametrize(("run", "alarm"), SICK.items())
def test_the_alarm_fires_on_the_sick_run(run, alarm):
    assert alarm in raised(run)


@pytest.mark.parametrize("run", QUIET)
def test_no_alarm_at_any_evaluation_of_a_healthy_run(run):
    assert raised_on_the_way(run) == set()


@pytest.mark.parametrize("run", DISPLACED)
def test_displacement_alone_is_reported_where_reward_rose(run):
    assert raised_on_the_way(run) == {"likelihood_displacement"}
    evals = [row for row in RUNS[run]["rows"] if row["split"] == "eval"]
    assert evals[-1]["logp/chosen"] < evals[0]["logp/chosen"] - 1, "the alarm tells the truth"
    assert evals[-1]["true_reward_low"] > evals[0]["true_reward_high"]


@pytest.mark.parametrize("run", sorted(SICK))
def test_sick_runs_are_what_the_page_says(run):
    """The trouble is in the figures themselves, not only in the alarm."""
    healthy, rows = ([row for row in RUNS[name]["rows"] if row["split"] == "eval"] for name in ("healthy", run))
    first, last, best = rows[0], rows[-1], max(rows, key=lambda row: row["true_reward"])
    assert last["loss"] < first["loss"], "the loss alone does not tell"
    if run == "displacement":
        assert last["accuracy"] > 0.55 and last["logp/chosen"] < first["logp/chosen"] - 10
    elif run == "length":
        assert last["length"] > 1.3 * first["length"] and last["true_reward_high"] < healthy[-1]["true_reward"]
    elif run == "over-optimisation":
        assert first["step"] < best["step"] < last["step"] and last["true_reward"] < first["true_reward"] < best["true_reward"]
        assert last["reward/margin"] > best["reward/margin"]
    elif run == "wrong-reference":
        assert first["kl"] == 0 and first["reward/margin"] > 0.1 and first["accuracy"] > 0.55
    else:
        assert last["true_reward"] < first["true_reward"] - 2


def test_a_run_says_each_alarm_once_when_it_comes_and_explains_it_in_the_end(tmp_path, capsys):
    settings = ["model=bandit", "data=bandit", "optim.lr=5", "train.steps=12", "train.eval_every=4"]
    assert train(tmp_path / "run", *settings) == 0
    said = capsys.readouterr().err
    assert re.findall(r"ALARM after step (\d+): Chosen replies became less likely \((.*)\)", said) == [
        ("4", f"{GUIDE.as_uri()}#likelihood-displacement")
    ]
    assert said.count("ALARM Chosen replies became less likely: On held-out pairs") == 1
    assert (tmp_path / "run" / GUIDE.name).is_file(), "the report's link leads to a file beside it"
    [check] = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["split"] == "check"]
    assert check["policy_minus_reference"] == pytest.approx(0, abs=1e-4) and check["loss"] == pytest.approx(check["theory"])


def test_page_figures_and_installed_guide_are_what_the_json_gives(capsys):
    assert script().main(["--check"]) == 0, capsys.readouterr().err


def anchors_of_alarms() -> set[str]:
    """The third argument of every Alarm that the module can make."""
    tree = ast.parse((GUIDE.parent / "alarms.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Alarm"]
    assert len(calls) >= 8
    return {call.args[2].value for call in calls}


def test_every_link_of_an_alarm_leads_to_a_heading():
    headings = {script().slug(m) for m in re.findall(r"^#+ (.+)$", PAGE.read_text(encoding="utf-8"), re.M)}
    ids = set(re.findall(r'<h\d id="([^"]+)"', GUIDE.read_text(encoding="utf-8")))
    assert headings == ids
    assert anchors_of_alarms() <= headings
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE.read_text(encoding="utf-8"))) <= headings


def test_every_figure_is_there_and_stands_alone():
    used = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(used) == 6
    for name in used:
        svg = (PAGE.parent / name).read_text(encoding="utf-8")
        assert 'fill="#fff"/>' in svg and not re.search(r"\bnan\b|\binf\b|href|url\(", svg)
    installed = GUIDE.read_text(encoding="utf-8")
    assert installed.count("data:image/svg+xml") == len(used) and "<script" not in installed
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in re.findall(r'(?:href|src)="([^"]+)"', installed)
               if not link.startswith("data:"))  # fmt: skip


def commands() -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("prefopt train")]


@pytest.mark.parametrize("number", range(len(commands())))
def test_every_command_of_the_page_composes(number):
    words = [w for w in shlex.split(commands()[number])[2:] if not w.startswith("hydra.")]
    algo = next((w.partition("=")[2] for w in words if w.startswith("algo=")), "dpo")
    assert typed(composed(*words), "train", algo).run_dir


def test_the_page_has_a_command_for_every_trouble():
    assert len(commands()) == 7  # healthy, five troubles, and the fine-tuning that the wrong reference starts from
