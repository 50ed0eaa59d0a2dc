"""The comparison of runs: length-controlled win rates, ranking accuracy, online runs, budgets, and what is said of rewards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from prefopt.report.compare_page import _path, _seen, _until, page, table
from prefopt.report.compare_results import measure
from prefopt.report.estimators import length_controlled
from tests.unit.test_compare import edit, make_run


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return make_run(tmp_path / "one", "dpo"), make_run(tmp_path / "two", "simpo", gain=1.5)


def test_what_sampling_and_checkpointing_execute_is_counted(tmp_path):
    """Two rounds of 64 replies of 10 and of 20 tokens, forward passes only; checkpointing runs each forward pass again."""
    plain, online = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    edit(online, "metrics.jsonl", lambda row: row | (
        {"samples": 64 if row["step"] < 75 else 128, "rollout/length": 10 if row["step"] < 75 else 20} if row["split"] == "train" else {}))
    again = make_run(tmp_path / "c", seed=2, model__gradient_checkpointing=True)
    runs = {run.name: run for run in measure([plain, online, again]).runs}
    assert runs["a"].figure("flops") == 8000 * 100_000 and runs["c"].figure("flops") == 10_000 * 100_000
    assert runs["b"].figure("flops") - runs["a"].figure("flops") == 2000 * (64 * 10 + 64 * 20)
    assert runs["b"].figure("samples") == 128 and runs["a"].figure("samples") is None


def test_online_runs_stand_beside_offline_ones_with_their_budgets(tmp_path):
    runs = [make_run(tmp_path / "a", source={"kind": "offline", "samples": 2})]
    for i, samples in enumerate((400, 800)):
        runs.append(make_run(tmp_path / f"b{i}", source={"kind": "rounds", "samples": 2 + i}, gain=1.5))
        edit(runs[-1], "metrics.jsonl", lambda r, n=samples / 100: r | ({"samples": n * r["step"]} if r["split"] == "train" else {}))
    results = measure(runs)
    assert sorted(m.label for m in results.methods) == ["dpo source=offline", "dpo source=rounds samples=2", "dpo source=rounds samples=3"]
    text = table(results)
    assert "sampled replies" in text and "Sampled replies: trained on stored replies, none were sampled to learn from." in text
    assert "Some methods learnt from stored replies alone, others had up to 800 replies of their own judged: not an equal budget." in text
    assert "The runs sampled different numbers of replies to learn from (400 to 800): not an equal budget." in text
    assert "sampled replies" not in table(measure([runs[0], make_run(tmp_path / "c", "simpo", source={"kind": "offline", "samples": 2})]))


def test_length_controlled_win_rates_are_those_of_the_estimator(pair):
    longer = {}
    edit(pair[0], "samples.jsonl", lambda row: row | {"tokens": row["tokens"] + (6 if row["step"] else 0)})
    for row in map(json.loads, (pair[0] / "samples.jsonl").read_text().splitlines()):
        longer.setdefault(row["step"], []).append((row["reward"], row["tokens"]))
    (start, start_tokens), (end, end_tokens) = (np.array(longer[s], dtype=float).T for s in (0, 100))
    wanted = length_controlled(0.5 * (1 + np.sign(end - start)), end_tokens - start_tokens).mean()
    results = measure(pair)
    method = next(i for i, m in enumerate(results.methods) if m.label == "dpo")
    found = results.estimates[method]["lc_win_rate"]
    assert found.mean == pytest.approx(wanted) and found.low < found.mean < found.high
    edit(pair[0], "samples.jsonl", lambda row: row | {"tokens": row["tokens"] + (100 if row["step"] else 0)})
    text = table(measure(pair))
    assert "Length-controlled win rate: all replies are longer than the initial policy's, or all are shorter." in text


def test_ranking_accuracy_has_a_column_where_it_was_measured(pair):
    assert "ranking %" not in (text := table(measure(pair))) and "Ranking accuracy (the run reports no ranking accuracy)" in text
    for run in pair:
        edit(run, "metrics.jsonl", lambda row: row | ({"ranking_accuracy": 0.625} if row["split"] == "eval" else {}))
    text = table(measure(pair))
    assert "ranking %" in text and re.search(r"6[23] \[\d\d, \d\d\]", text)


def test_different_numbers_of_seeds_are_said(tmp_path):
    runs = [make_run(tmp_path / f"d{s}", seed=s) for s in range(3)] + [make_run(tmp_path / f"s{s}", "simpo", seed=s) for s in range(2)]
    assert "Methods have different numbers of seeds (2 of simpo; 3 of dpo): how wide their intervals are" in table(measure(runs))


def test_a_reward_models_opinion_is_no_true_reward(pair):
    def renamed(row):
        return {("reward" if k == "true_reward" else k): v for k, v in row.items()}

    edit(pair[0], "metrics.jsonl", renamed)
    assert "Some runs were judged by a known reward, others by a reward model" in table(measure(pair))
    edit(pair[1], "metrics.jsonl", renamed)
    assert "No true reward is known: what is called so here, and win rates, are a reward model's opinion" in table(measure(pair))


SPEED = {"unit": "pairs", "steps": 98, "rows_per_second": 5.12, "tokens_per_second": 2340.4, "useful_mfu": 0.412, "hardware_mfu": 0.62,
         "padding": 0.034, "peak_memory": 9.12e9}


def timed(run: Path, speed: dict, **manifest) -> Path:
    """The run, with these speeds in its status."""
    for name, more in (("status", {"speed": speed}), ("manifest", manifest)):
        path = run / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return run


def test_speeds_stand_in_a_table_of_their_own_with_the_hardware(pair, tmp_path):
    assert "pairs/s" not in table(measure(pair)), "runs of earlier versions have none, and nobody is told so five times"
    cpu = {"device": "cpu", "machine": "A Fine CPU", "threads": 1, "processes": 1}
    timed(pair[0], SPEED, **cpu)
    timed(pair[1], SPEED | {"rows_per_second": 7.5, "peak_memory": 4e9}, **cpu)
    results = measure(pair)
    text = table(results)
    assert re.search(r"method +pairs/s +tokens/s +useful MFU % +padding % +peak memory GB\nA +simpo +7.50 +2340 +41 +3 +4.0\nB", text)
    assert "speeds are averages over training steps; hardware: A Fine CPU, 1 thread" in text and "different hardware" not in text
    html = page(results)
    assert "Table 3. How fast it was." in html and "Table 4. Difference in true reward" in html and "Table 5. Head-to-head" in html
    assert "hardware: A Fine CPU, 1 thread" in html and "Useful MFU.</dt>" in html and "Useful MFU" not in html.partition("toprule")[2]
    timed(pair[1], SPEED, device="cuda", machine="NVIDIA H200", threads=1, processes=2)
    results = measure(pair)
    said = ("The runs were made on different hardware or threads, so their times, speeds, MFU and memory cannot be compared "
            "(hardware differs: A: 2 × NVIDIA H200; B: A Fine CPU, 1 thread).")
    assert said in table(results) and said in page(results)


def test_speeds_that_a_run_lacks_and_rows_that_are_no_pairs_are_said(pair):
    timed(pair[0], {k: v for k, v in SPEED.items() if "mfu" not in k} | {"unit": "completions"})
    timed(pair[1], SPEED)
    text = table(measure(pair))
    assert "Pairs/s: counted are completions, not pairs." in text
    assert "Useful MFU: the model's FLOPs are not known." in text


def test_shares_of_different_peaks_are_said(pair):
    for run, tflops in zip(pair, (0.05, 0.051), strict=True):
        timed(run, SPEED, peak={"tflops": tflops, "from": "a measured matrix product"})
    assert "different peaks" not in table(measure(pair))
    timed(pair[1], SPEED, peak={"tflops": 0.0181, "from": "a measured matrix product"})
    assert "MFU is a share of different peaks (18.1 to 50 GFLOP/s, see the manifests), so it cannot be compared" in table(measure(pair))


def test_online_and_offline_pictures_are_compared_at_equal_numbers(tmp_path):
    """One run trained on 800 pictures, the other on 400, of which the first had seen that many half-way: its path ends there."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", gain=1.5, source={"kind": "rounds"})]
    for run, each in zip(runs, (8, 4), strict=True):
        edit(run, "metrics.jsonl", lambda row, n=each: row | ({"pictures": n * row["step"]} if row["split"] == "train" else {}))
    results = measure(runs)
    longer, shorter = sorted(range(2), key=lambda i: "rounds" in results.methods[i].label)
    seen = [_seen(method) for method in results.methods]
    assert list(seen[longer].values()) == [0, 200, 400, 600, 800] and list(seen[shorter].values()) == [0, 100, 200, 300, 400]
    whole = [_path(results, i, "kl").curve for i in range(2)]
    for common, kept in ((400, 3), (500, 3)):
        cut = [_until(_path(results, i, "kl"), seen[i], common).curve for i in range(2)]
        assert cut[shorter] == whole[shorter] and cut[longer][:kept] == whole[longer][:kept]
    assert len(cut[longer]) == 4, "half-way between the third and the fourth evaluation"
    assert cut[longer][3] == pytest.approx([(a + b) / 2 for a, b in zip(*whole[longer][2:4], strict=True)])
    assert "at equal numbers of pictures" in page(results)
