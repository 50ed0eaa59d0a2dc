"""scripts/zoo.py: what is run and what is not run twice, which settings are chosen, and what goes into docs/zoo.md."""

from __future__ import annotations

import importlib
import json
import random
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from prefopt.config.catalogue import groups
from prefopt.report.compare_stats import mean_interval
from prefopt.tracking.tracker import read_jsonl
from tests.toy_runs import train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # they import one another
zoo, report = (importlib.import_module(name) for name in ("zoo", "zoo_report"))
sys.path.pop(0)
PROMPTS, SVG = 20, "{http://www.w3.org/2000/svg}"


def pretended(job) -> dict:
    """What a run might give: the middle learning rate and the strongest hold are best, noise costs one nat."""
    rng = random.Random(f"{job.method} {job.seed} {job.condition}")
    level = {"dpo": 2.0, "ipo": 3.0, "simpo": 2.5}.get(job.method, 1.0)
    level -= abs(job.lr - zoo.RATES[1]) * 1000 + (job.condition == "label noise")
    strength = (job.strength or 0.0) / (zoo.strength_of(job.method)[1] if job.strength else 1.0)
    rewards = [round(level + 0.1 * strength + rng.gauss(0, 0.2), 4) for _ in range(PROMPTS)]
    return {"true_reward": rewards, "kl": [level + rng.random() for _ in rewards], "length": [10.0] * PROMPTS, "skipped": 0}


@pytest.fixture
def done(monkeypatch):
    """The jobs that were run, in their order; runs are pretended."""
    jobs = []
    monkeypatch.setattr(zoo, "train_once", lambda job, _: jobs.append(job) or pretended(job))
    return jobs


def fill(path, methods, seeds=2, **more):
    with ThreadPoolExecutor(1) as pool:
        return zoo.fill(path, methods, seeds, pool, 1, **more)


# ---- what is run -----------------------------------------------------------------------------------


def test_every_algorithm_is_in_it_or_left_out_with_a_reason():
    assert {*zoo.all_methods(), *zoo.left_out()} == set(groups()["algo"]) and not set(zoo.all_methods()) & zoo.left_out().keys()
    assert {"grpo", "online_dpo", "reward_bt"} <= zoo.left_out().keys() and {"dpo", "kto", "sft", "lipo"} <= set(zoo.all_methods())


def test_every_grid_holds_what_is_recommended():
    for method in zoo.all_methods():
        points = zoo.grid(method)
        rates, strengths = ({p[i] for p in points} for i in (0, 1))
        assert rates == set(zoo.RATES) and len(points) == len(rates) * len(strengths), method
        tuned = zoo.strength_of(method)
        assert tuned[1] in strengths if tuned else strengths == {None}, f"{method}: the recommended strength is a choice"


@pytest.mark.parametrize("method", ["dpo", "orpo", "lipo", "sft"])
def test_settings_reach_the_config(method):
    tuned, job = zoo.strength_of(method), zoo.Job(method, "length bias", 3, *zoo.grid(method)[-1])
    cfg = zoo.config(job, Path("somewhere"))
    assert (cfg.optim.lr, cfg.seed, cfg.data.length_bias, cfg.train.steps) == (job.lr, 3, 1.0, zoo.COMMON["train.steps"])
    assert cfg.algo["name"] == method and (not tuned or cfg.algo[tuned[0]] == job.strength)


def test_a_second_start_does_only_what_is_missing(tmp_path, done):
    path = tmp_path / "zoo" / "results.jsonl"
    expected = 2 + len(zoo.tuning_jobs("dpo")) + 2 * len(zoo.CONDITIONS)
    assert fill(path, ["dpo"]) == len(done) == expected == len(set(done))
    assert fill(path, ["dpo"]) == 0 and len(done) == expected
    more = len(zoo.tuning_jobs("sft")) + 2 * len(zoo.CONDITIONS)
    assert fill(path, ["dpo", "sft"]) == more
    assert fill(path, ["dpo"], seeds=3) == 1 + len(zoo.CONDITIONS), "a third seed, of the start as well"
    # A start that was killed while it wrote a line does that run again, and nothing else.
    text = path.read_text()
    path.write_text(text[:-40])
    assert fill(path, ["dpo"], seeds=3) == 1
    rows = zoo.read(path)
    assert len(rows) == expected + more + 4 and {r["key"] for r in rows.values()} == set(rows)


def test_a_changed_setting_is_another_run(tmp_path, done, monkeypatch):
    path = tmp_path / "results.jsonl"
    count = fill(path, ["sft"])
    monkeypatch.setitem(zoo.COMMON, "train.steps", 7)
    zoo.key.cache_clear()
    assert fill(path, ["sft"]) == count
    monkeypatch.undo()
    zoo.key.cache_clear()


def test_final_runs_take_the_best_point_and_seeds_of_their_own(tmp_path, done):
    path = tmp_path / "results.jsonl"
    fill(path, ["dpo"])
    name, recommended = zoo.strength_of("dpo")
    best = (zoo.RATES[1], recommended * max(zoo.FACTORS))
    assert name == "beta" and zoo.chosen("dpo", zoo.read(path)) == best
    final = [job for job in done if job.method == "dpo" and job.seed not in zoo.TUNING_SEEDS]
    assert [(j.seed, j.condition) for j in final] == [(s, c) for s in range(2) for c in zoo.CONDITIONS]
    assert {(j.lr, j.strength) for j in final} == {best} and not set(range(100)) & set(zoo.TUNING_SEEDS)


def test_no_run_is_begun_after_the_hours_are_over(tmp_path, done):
    assert fill(tmp_path / "results.jsonl", ["dpo"], hours=0) == 0 and not done


def test_a_method_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path, monkeypatch):
    broken = {"dpo"}

    def run(job, work):
        if job.method in broken:
            raise RuntimeError("a hole in the road")
        return pretended(job)

    monkeypatch.setattr(zoo, "train_once", run)
    path = tmp_path / "results.jsonl"
    fill(path, ["dpo", "sft"])
    found = {e["method"]: e for e in zoo.summary(zoo.read(path), ["dpo", "sft"], 2)["methods"]}
    assert "clean" in found["sft"] and "clean" not in found["dpo"]
    assert found["dpo"]["failed"] == len(zoo.tuning_jobs("dpo")) and "a hole in the road" in report.row(found["dpo"], ["clean"])[1]
    broken.clear()
    assert fill(path, ["dpo", "sft"]) == len(zoo.tuning_jobs("dpo")) + 2 * len(zoo.CONDITIONS)
    found = {e["method"]: e for e in zoo.summary(zoo.read(path), ["dpo", "sft"], 2)["methods"]}
    assert "failed" not in found["dpo"] and found["dpo"]["clean"]["runs"] == 2


def test_an_unknown_method_is_refused_with_the_nearest(capsys):
    assert zoo.main(["--methods", "simpoo"]) == 2 and "did you mean 'simpo'" in capsys.readouterr().err
    assert zoo.main(["--methods", "grpo"]) == 2 and "samples itself" in capsys.readouterr().err


# ---- a run -----------------------------------------------------------------------------------------


def test_a_run_is_what_the_command_line_would_have_made_of_it(tmp_path, tiny_lm, monkeypatch):
    common = {"train.steps": 3, "train.batch_size": 4, "data.limit": 16, "data.eval_limit": 6, "evaluation.prompts": 6}
    monkeypatch.setattr(zoo, "COMMON", common)
    job = zoo.Job("ipo", "label noise", 4, 1e-3, 0.5)
    found = zoo.attempt(job, tmp_path)
    words = [f"{k}={v}" for k, v in common.items()]
    assert train(tmp_path / "run", *words, "algo=ipo", "data.label_noise=0.3", "optim.lr=1e-3", "algo.tau=0.5", "seed=4") == 0
    row = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "eval"][-1]
    assert "error" not in found and len(found["true_reward"]) == 6
    for name, places in zoo.KEPT.items():
        assert fmean(found[name]) == pytest.approx(row[name], abs=10**-places), name
    assert row["kl"] != 0
    start = zoo.attempt(zoo.Job(zoo.INITIAL, "clean", 4, 1e-3, None), tmp_path)
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    first = next(r for r in first if r["split"] == "eval" and r["step"] == 0)
    assert fmean(start["true_reward"]) == pytest.approx(first["true_reward"], abs=1e-3) and not any(start["kl"])


# ---- the page --------------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path, done):
    path = tmp_path / "results.jsonl"
    fill(path, ["dpo", "ipo", "simpo", "sft"], seeds=3)
    return json.loads(json.dumps(zoo.summary(zoo.read(path), ["dpo", "ipo", "simpo", "sft", "kto"], 3)))


def test_the_table_holds_what_the_lines_say(tmp_path, result):
    entries = result["methods"]
    assert [e["method"] for e in entries] == ["ipo", "simpo", "dpo", "sft", "kto"], "best first, what has not been run last"
    rows = [r for r in zoo.read(tmp_path / "results.jsonl").values()
            if r["method"] == "ipo" and r["condition"] == "label noise" and r["seed"] < 3]
    grid = np.array([r["true_reward"] for r in rows])
    told = mean_interval(grid)
    assert len(rows) == 3 and entries[0]["label noise"]["true_reward"] == pytest.approx([told.mean, told.low, told.high], abs=1e-3)
    text = report.tables(result)
    line = next(part for part in text.splitlines() if part.startswith("| [ipo]"))
    assert report.span(entries[0]["label noise"]["true_reward"]) in line and "3 × 3" in line and "tau 0.5" in line
    assert entries[0]["against"][3] and line.count(" *") == 1, "far above DPO"
    assert "| [kto](algorithms.md) | 0 of 9 tuning runs |" in text
    assert "grpo" in text and "samples itself" in text
    assert report.runs({"clean": {"runs": 3}, "length bias": {"runs": 1}}, list(zoo.CONDITIONS)) == "3 + 0 + 1"
    for row in text.splitlines():
        assert not row.startswith("|") or row.count("|") == text.split("| method")[1].splitlines()[0].count("|") + 1


def test_the_plot_names_what_no_other_beats(result):
    points = {"good": (2.0, 1.0), "cheap": (1.0, 0.5), "beaten": (1.5, 1.5)}
    entries = [{"method": m, "clean": {"true_reward": [r, r - 0.1, r + 0.1], "kl": [k, k - 0.1, k + 0.1]}} for m, (r, k) in points.items()]
    assert [e["method"] for e in entries if report.unbeaten(e, entries, "clean")] == ["good", "cheap"]
    picture = ET.fromstring(report.plot({**result, "methods": entries, "conditions": ["clean"]}))
    texts = [t.text for t in picture.iter(f"{SVG}text")]
    assert "good" in texts and "cheap" in texts and "beaten" not in texts and "initial policy" in texts
    assert len(list(picture.iter(f"{SVG}circle"))) == 3
    titles = [t.text for t in ET.fromstring(report.plot(result)).iter(f"{SVG}text") if (t.text or "").startswith("Reward against")]
    assert len(titles) == len(zoo.CONDITIONS)


def test_render_fills_the_page_and_says_when_there_is_nothing(tmp_path, result):
    (tmp_path / "img").mkdir()
    page = tmp_path / "zoo.md"
    page.write_text("# Zoo\n<!-- zoo -->\nold\n<!-- /zoo -->\nend\n")
    report.render(tmp_path)
    assert report.MISSING in page.read_text() and not (tmp_path / "img" / "zoo.svg").exists()
    (tmp_path / "zoo.json").write_text(json.dumps(result))
    report.render(tmp_path)
    assert report.tables(result) in page.read_text() and page.read_text().endswith("end\n") and (tmp_path / "img" / "zoo.svg").is_file()


def test_the_published_page_quotes_its_json():
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert report.block(ROOT / "docs") in page, "python scripts/zoo.py --render"
    path = ROOT / "docs" / "zoo.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        assert (ROOT / "docs" / "img" / "zoo.svg").read_text(encoding="utf-8") == report.plot(found), "python scripts/zoo.py --render"
        for entry in found["methods"]:
            for condition in found["conditions"]:
                for mean, low, high in (entry[condition][name] for name in zoo.KEPT if condition in entry):
                    assert low <= mean <= high
