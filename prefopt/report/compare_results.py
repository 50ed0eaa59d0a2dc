"""What a comparison measures of every method, and between every two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from prefopt.report.compare_runs import SAMPLED, Method, Run, check_data, check_prompts, dig, find_runs, group
from prefopt.report.compare_stats import Difference, Estimate, compare_pairs, mean_interval, reward_pair, share_interval, win_pair


@dataclass(frozen=True)
class Measure:
    """A column: figures are shown times `scale` with `decimals`."""

    key: str
    title: str
    short: str  # the terminal's heading
    unit: str = ""
    scale: float = 1.0
    decimals: int | None = 2  # None: three digits or so


MEASURES = (
    Measure("true_reward", "True reward", "true reward"),
    Measure("win_rate", "Win rate vs initial", "win rate %", "%", 100, 0),
    Measure("lc_win_rate", "Length-controlled win rate", "at equal length %", "%", 100, 0),
    Measure("kl", "KL", "KL nats", "nats"),
    Measure("accuracy", "Held-out accuracy", "accuracy %", "%", 100, 0),
    Measure("ranking_accuracy", "Ranking accuracy", "ranking %", "%", 100, 0),
    Measure("length", "Reply length", "length", "tokens", 1, 1),
    Measure("finished", "Finished", "finished %", "%", 100, 0),
)
COSTS = (
    Measure("seconds", "Time", "time"), Measure("tokens", "Tokens", "tokens"), Measure("pictures", "Pictures", "pictures"),
    Measure("samples", "Sampled replies", "sampled replies"),
    Measure("flops", "Executed FLOPs", "executed FLOPs"),
)  # fmt: skip
SPEEDS = (
    Measure("rows_per_second", "Pairs/s", "pairs/s", "", 1, None), Measure("tokens_per_second", "Tokens/s", "tokens/s", "", 1, None),
    Measure("pictures_per_second", "Pictures/s", "pictures/s", "", 1, None),
    Measure("useful_mfu", "Useful MFU", "useful MFU %", "%", 100, 0), Measure("padding", "Padding", "padding %", "%", 100, 0),
    Measure("peak_memory", "Peak memory", "peak memory GB", "GB", 1e-9, 1),
)  # fmt: skip
# What only these have.
OF_TEXTS, OF_PICTURES = ("lc_win_rate", "length", "finished", "tokens", "tokens_per_second", "padding"), ("pictures", "pictures_per_second")
SHARES = ("win_rate", "lc_win_rate", "accuracy", "ranking_accuracy", "finished")
NEVER_NEGATIVE = ("kl", "length")  # their intervals end at 0, whatever the spread between two seeds says


@dataclass
class Results:
    """Everything the table and the page are made from. `estimates[i][key]` is None where method i has none."""

    methods: list[Method]
    runs: list[Run]
    paired: bool  # all runs answered the same prompts
    data_differs: list[str]
    remarks: list[str]
    estimates: list[dict[str, Estimate | None]] = field(default_factory=list)
    initial: dict[str, Estimate] = field(default_factory=dict)  # the policy all runs started from, where it is one
    rewards: list[Difference] = field(default_factory=list)
    wins: list[Difference] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        return min((len(run.ids[: m.limit]) for m in self.methods for run in m.runs if run.ids), default=0)

    def known(self, key: str) -> bool:
        return any(e[key] is not None for e in self.estimates)


def measure(folders: Sequence[Path], allow_different_data: bool = False) -> Results:
    """Reads, checks, groups and tests."""
    runs, remarks = find_runs(folders)
    data_differs = check_data(runs, allow_different_data)
    paired = check_prompts(runs, allow_different_data)
    # Unpaired prompts are put beside each other in any order, which adds their variances as independent samples should.
    limit = None if paired else min(len(run.ids) for run in runs if run.ids)
    methods = group(runs, limit)
    estimates = [{m.key: _estimate(method, m.key) for m in (*MEASURES, *COSTS, *SPEEDS)} for method in methods]
    order = sorted(range(len(methods)), key=lambda i: _rank(estimates[i]))  # the sort is stable: equals stay in order of their labels
    results = Results([methods[i] for i in order], runs, paired, data_differs, remarks, [estimates[i] for i in order])
    for i, method in enumerate(results.methods):
        method.letter = letter(i)
    results.initial = _initial(runs, limit)
    rated = [i for i, e in enumerate(results.estimates) if e["true_reward"] is not None]
    results.rewards = _tests(results.methods, rated, head_to_head=False)
    results.wins = _tests(results.methods, rated, head_to_head=True) if paired else []
    return results


def _rank(estimates: dict[str, Estimate | None]) -> float:
    """Best reward first; methods without one last."""
    reward = estimates["true_reward"]
    return -reward.mean if reward else float("inf")


def letter(i: int) -> str:
    """A ... Z, AA, AB, ...: what a method is called where its label is too long."""
    return (letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _estimate(method: Method, key: str) -> Estimate | None:
    if key in SAMPLED:
        grid = method.grid(key)
        if grid is None:
            return None
        estimate = mean_interval(grid, share=key in SHARES)
        return replace(estimate, low=max(estimate.low, 0.0)) if key in NEVER_NEGATIVE and estimate.mean >= 0 else estimate
    of_seed: dict = {}
    for run in method.runs:
        if (value := run.figure(key)) is not None:
            of_seed.setdefault(run.seed, []).append(value)
    means = [sum(values) / len(values) for values in of_seed.values()]
    if not means:
        return None
    if key in SHARES:
        units = [dig(run.manifest, "data.eval.rows") for run in method.runs]
        return share_interval(means, min(units) if all(isinstance(n, int) for n in units) else None)
    # Costs and speeds are known exactly: their range is shown, and no interval.
    everything = [value for values in of_seed.values() for value in values]
    return Estimate(sum(means) / len(means), min(everything), max(everything), len(means))


def _initial(runs: Sequence[Run], limit: int | None) -> dict[str, Estimate]:
    """The initial policy's own figures, if all runs started from the same one: one run for each seed, since they repeat each other."""
    starts = {dig(run.manifest, "model.fingerprint") for run in runs}
    judged = [run for run in runs if run.ids and any(row["step"] == 0 for row in run.evals)]
    began = [run for run in judged if set(run.ids) <= run.samples.get(0.0, {}).keys()]
    by_seed = {run.seed: replace(run, samples={0.0: {i: run.samples[0.0][i] for i in run.ids}}) for run in began}
    if len(starts) > 1 or None in starts or not by_seed:
        return {}
    start = Method("initial policy", list(by_seed.values()), limit=limit)
    found = {key: _estimate(start, key) for key in ("true_reward", "length", "finished")}
    return {key: estimate for key, estimate in found.items() if estimate}


def _tests(methods: Sequence[Method], rated: Sequence[int], head_to_head: bool) -> list[Difference]:
    pairs = []
    for a, b in combinations(rated, 2):
        if head_to_head:
            grids = [methods[i].run_grid("true_reward") for i in (a, b)]
            seeds = [[run.seed for run in methods[i].with_values("true_reward")] for i in (a, b)]
            pairs.append(win_pair(a, b, *grids, *seeds))
        else:
            pairs.append(reward_pair(a, b, methods[a].grid("true_reward"), methods[b].grid("true_reward")))
    counts = [len({str(run.seed) for run in method.with_values("true_reward")}) or 1 for method in methods]
    return compare_pairs(pairs, counts)
