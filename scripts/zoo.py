"""All offline objectives on the tiny world under equal compute, for docs/zoo.md.

    python scripts/zoo.py                                 tunes and runs what is not there yet, then writes the page
    python scripts/zoo.py --methods dpo,ipo --hours 2     these, and no new run after two hours
    python scripts/zoo.py --render                        writes the page from docs/zoo.json alone

Every run is a line of runs/zoo/results.jsonl under a key made of all that decides it, so a second start does what is missing and no more,
and a changed setting is another run. A method is tuned on clean labels, over one grid for all, with seeds of its own; what was found is
then run with every seed under every condition. Workers are processes with one thread each; runs take place inside them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from prefopt.config.catalogue import algo_info, groups, load_yaml, modalities
from prefopt.config.compose import check_algo
from prefopt.errors import UserError, nearest
from prefopt.report.compare_stats import Estimate, compare_pairs, mean_interval, reward_pair

ROOT = Path(__file__).resolve().parent.parent
DOCS, WORK = ROOT / "docs", ROOT / "runs" / "zoo"

# What every run shares, as keys of conf/train.yaml: as many rows as the steps take, each seen once.
COMMON: dict[str, Any] = {
    "train.steps": 24, "train.batch_size": 16, "data.limit": 384, "data.eval_limit": 128, "evaluation.prompts": 128,
    "sampler.batch_size": 128, "train.self_check": False,
}  # fmt: skip
CONDITIONS: dict[str, dict[str, Any]] = {
    "clean": {}, "label noise": {"data.label_noise": 0.3}, "length bias": {"data.length_bias": 1.0},
}  # fmt: skip
RATES = (3e-4, 8e-4, 2e-3)
FACTORS = (0.2, 1.0, 5.0)  # times the strength that conf/algo recommends
STRENGTHS = ("beta", "tau", "eta", "lambda_", "delta", "rrhf_weight", "sft_weight")  # the first of these that a method has is tuned
TUNING_SEEDS = (1000,)
INITIAL, YARDSTICK = "initial policy", "dpo"
KEPT = {"true_reward": 4, "kl": 3, "length": 0}  # one value per prompt, to so many decimals


@dataclass(frozen=True)
class Job:
    """One run. `strength` is the value of the method's strength; None where it has none."""

    method: str
    condition: str
    seed: int
    lr: float
    strength: float | None


# ---- what there is to do -----------------------------------------------------------------------------


def brought(method: str) -> dict[str, str]:
    """Groups that a method chooses by itself -> what it chooses."""
    parts = load_yaml("algo", method).get("defaults", [])
    return {word.partition("/")[2].partition("@")[0]: name for part in parts for word, name in part.items()}


@cache
def left_out() -> dict[str, str]:
    """Algorithms that do not belong here -> why."""
    out = {}
    for slug in groups()["algo"]:
        if brought(slug).get("source", "offline") != "offline":
            out[slug] = "learns from replies that it samples itself"
        elif "llm" not in modalities(algo_info(slug)):
            out[slug] = "is about pictures"
        elif algo_info(slug).scores_rewards:
            out[slug] = "trains a reward model, which writes no replies"
    return out


def all_methods() -> list[str]:
    return [slug for slug in groups()["algo"] if slug not in left_out()]


@cache
def strength_of(method: str) -> tuple[str, float] | None:
    """(field, recommended value) of the setting that says how strongly a method holds on to where it is, or weighs its terms."""
    settings = load_yaml("algo", method)
    found = ((name, settings.get(name)) for name in STRENGTHS)
    return next(((name, float(v)) for name, v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0), None)


@cache
def grid(method: str) -> tuple[tuple[float, float | None], ...]:
    """(learning rate, strength) to choose from; values that the method's own rules refuse are no choice."""
    tuned = strength_of(method)
    strengths: list[float | None] = [None] if tuned is None else []
    settings = {k: v for k, v in load_yaml("algo", method).items() if k != "defaults"}
    for factor in FACTORS if tuned else ():
        value = float(f"{tuned[1] * factor:.6g}")
        with contextlib.suppress(UserError):
            check_algo({**settings, tuned[0]: value}, [], method)
            strengths.append(value)
    return tuple((rate, strength) for rate in RATES for strength in strengths)


@cache
def key(job: Job) -> str:
    """Names everything that decides a run's result, but for the code."""
    algo = None if job.method == INITIAL else load_yaml("algo", job.method)
    said = json.dumps([asdict(job), COMMON, CONDITIONS[job.condition], algo], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:20]


def tuning_jobs(method: str) -> list[Job]:
    return [Job(method, "clean", seed, rate, strength) for seed in TUNING_SEEDS for rate, strength in grid(method)]


def chosen(method: str, results: Mapping[str, dict]) -> tuple[float, float | None] | None:
    """The settings with the highest mean true reward over the tuning seeds; None while one of them is missing, or where all failed."""
    jobs = tuning_jobs(method)
    if any(key(job) not in results for job in jobs):
        return None
    rewards: dict[tuple[float, float | None], list[float]] = {}
    for job in jobs:
        if "error" not in (row := results[key(job)]):
            rewards.setdefault((job.lr, job.strength), []).append(fmean(row["true_reward"]))
    return max(rewards, key=lambda point: fmean(rewards[point])) if rewards else None


def final_jobs(method: str, settings: tuple[float, float | None], seeds: int) -> list[Job]:
    """Seed by seed, so that an unfinished zoo knows all conditions equally well."""
    return [Job(method, condition, seed, *settings) for seed in range(seeds) for condition in CONDITIONS]


def initial_jobs(seeds: int) -> list[Job]:
    """The policy that all start from: labels play no part."""
    return [Job(INITIAL, "clean", seed, RATES[0], None) for seed in range(seeds)]  # of no step, so the rate means nothing


def jobs(methods: Sequence[str], seeds: int, results: Mapping[str, dict]) -> Iterator[Job]:
    """Everything that can be run as things stand, in the order in which it should be."""
    yield from initial_jobs(seeds)
    for method in methods:
        yield from tuning_jobs(method)
        if settings := chosen(method, results):
            yield from final_jobs(method, settings, seeds)


# ---- a run -------------------------------------------------------------------------------------------


@cache
def composed(method: str) -> Any:
    """The config of `prefopt train algo=METHOD`; composed once per process."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("slug", lambda text: str(text), replace=True)
    OmegaConf.register_new_resolver("output_dir", lambda: "none", replace=True)
    with initialize_config_module("prefopt.conf", version_base="1.3"):
        return compose("train", [f"algo={method}", "hardware=cpu", "hardware.threads=1"])


def config(job: Job, work: Path) -> Any:
    """The typed config of a run. Runs that others need first lie in a folder for all that need the same. Raises `UserError`."""
    from omegaconf import OmegaConf

    from prefopt.config.compose import typed

    method = "sft" if job.method == INITIAL else job.method  # which asks for no reference
    cfg = copy.deepcopy(composed(method))
    changes = {**COMMON, **CONDITIONS[job.condition], "optim.lr": job.lr, "seed": job.seed}
    if job.strength is not None:
        changes[f"algo.{strength_of(job.method)[0]}"] = job.strength
    for name, value in changes.items():
        OmegaConf.update(cfg, name, value)
    OmegaConf.update(cfg, "run_dir", str(work))
    found = typed(cfg, "train", method)
    if not found.stages:
        return found
    needed = json.dumps([found.stages, COMMON, job.condition, job.seed], default=str)
    OmegaConf.update(cfg, "run_dir", str(work / "first" / hashlib.sha256(needed.encode()).hexdigest()[:12]))
    return typed(cfg, "train", method)


def run_first(job: Job, cfg: Any) -> None:
    """The runs that this one needs first, on the same rows; those that are there are left alone. They lie under the folder of `config`."""
    from filelock import FileLock

    from prefopt.cli import main as prefopt
    from prefopt.config.stages import stage_folder, words

    common = {**COMMON, **CONDITIONS[job.condition], "seed": job.seed, "evaluation.prompts": 0, "evaluation.kl": False}
    for name, settings in cfg.stages.items():
        folder = Path(stage_folder(cfg.run_dir, name))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            line = ["train", "hardware=cpu", "hardware.threads=1", *words(common), *words(settings), f"hydra.run.dir={folder}"]
            with contextlib.redirect_stderr(io.StringIO()) as said:
                if prefopt(line):
                    raise RuntimeError(f"the run before it failed: {said.getvalue().strip()[-200:]}")


def train_once(job: Job, work: Path) -> dict[str, Any]:
    """Trains and judges in this process, on one thread. One value per held-out prompt of reward, KL and length."""
    from prefopt.training.engine import learning_rate
    from prefopt.training.setup import make_accelerator, set_up

    cfg = config(job, work)
    run_first(job, cfg)
    with contextlib.redirect_stderr(io.StringIO()):
        run = set_up(cfg, make_accelerator(cfg))
        steps, skipped = 0 if job.method == INITIAL else run.total_steps, 0
        for step in range(steps):
            run.moving(step)
            skipped += run.engine.step(run.source.step(step), learning_rate(step, steps, cfg.optim)).skipped
        run.judge.held_out = None  # only samples are judged
        found = run.judge.measure(steps).replies
    return {**{name: [round(float(v), places) for v in found[name]] for name, places in KEPT.items()}, "skipped": skipped}


def attempt(job: Job, work: Path) -> dict[str, Any]:
    """The line of a run. A method that fails is part of the result and does not stop the others."""
    began = time.monotonic()
    try:
        found = train_once(job, work)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"key": key(job), **asdict(job), "seconds": round(time.monotonic() - began, 2), **found}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """key -> line. A line that was not written to its end is not there; of two with one key the later counts."""
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            out[row["key"]] = row
    return out


def fill(path: Path, methods: Sequence[str], seeds: int, pool: Executor, workers: int, hours: float | None = None) -> int:
    """Runs what `path` lacks, `workers` at a time, and adds a line for each; returns how many. After `hours` no further one is begun.
    What failed in an earlier start is tried again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {k: row for k, row in read(path).items() if "error" not in row}
    if path.is_file() and (text := path.read_text(encoding="utf-8")) and not text.endswith("\n"):
        path.write_text(text + "\n", encoding="utf-8")  # a killed start's half line stays alone
    began, count = time.monotonic(), 0
    busy: dict[Any, Job] = {}
    with path.open("a", encoding="utf-8") as out:
        while True:
            while len(busy) < workers and (hours is None or time.monotonic() - began < 3600 * hours):
                job = next((j for j in jobs(methods, seeds, results) if key(j) not in results and j not in busy.values()), None)
                if job is None:
                    break
                busy[pool.submit(attempt, job, path.parent)] = job
            if not busy:
                return count
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                job, row = busy.pop(future), future.result()
                results[key(job)] = row
                out.write(json.dumps(row) + "\n")
                out.flush()
                count += 1
                said = row["error"] if "error" in row else f"true reward {fmean(row['true_reward']):.2f}"
                print(f"{count}: {job.method}, {job.condition}, seed {job.seed}, lr {job.lr:g}, {job.strength}: {said} "
                      f"({row['seconds']:.1f} s)", file=sys.stderr, flush=True)


# ---- what came of it -----------------------------------------------------------------------------------


def estimate(rows: Sequence[dict], name: str) -> list[float]:
    """[mean, low, high] over seeds and prompts, by the bootstrap of `prefopt compare`."""
    found: Estimate = mean_interval(np.array([row[name] for row in rows], dtype=float))
    low = max(found.low, 0.0) if name != "true_reward" and found.mean >= 0 else found.low
    return [round(v, 3) for v in (found.mean, low, found.high)]


def summary(results: Mapping[str, dict], methods: Sequence[str], seeds: int) -> dict[str, Any]:
    """Everything the page says, from the lines of the runs."""
    def done(wanted: Sequence[Job]) -> list[dict]:
        return [results[key(job)] for job in wanted if "error" not in results.get(key(job), {"error": ""})]

    def figures(rows: Sequence[dict]) -> dict[str, Any]:
        return {"runs": len(rows), **{name: estimate(rows, name) for name in KEPT}}

    entries, grids, every = [], {}, done(initial_jobs(seeds))
    for method in methods:
        every += done(tuning := tuning_jobs(method))
        entry: dict[str, Any] = {"method": method, "tuned": len(done(tuning)), "points": len(tuning), "first": "stages" in brought(method)}
        failed = [results[key(job)]["error"] for job in tuning if "error" in results.get(key(job), {})]
        if settings := chosen(method, results):
            tuned = strength_of(method)
            entry |= {"lr": settings[0], "strength": tuned and [tuned[0], settings[1]]}
            every += done(finals := final_jobs(method, settings, seeds))
            failed += [results[key(job)]["error"] for job in finals if "error" in results.get(key(job), {})]
            for condition in CONDITIONS:
                if rows := done([job for job in finals if job.condition == condition]):
                    entry[condition] = figures(rows)
                    if condition == "clean":
                        grids[method] = np.array([row["true_reward"] for row in rows], dtype=float)
            entry["seconds"] = round(median([row["seconds"] for row in done(finals)] or [0.0]), 1)
        if failed:
            entry |= {"failed": len(failed), "error": failed[0]}
        entries.append(entry)
    names = list(grids)
    pairs = [reward_pair(i, names.index(YARDSTICK), grids[m], grids[YARDSTICK]) for i, m in enumerate(names)
             if YARDSTICK in grids and m != YARDSTICK]  # fmt: skip
    for found in compare_pairs(pairs, [len(grids[m]) for m in names]):
        entry = next(e for e in entries if e["method"] == names[found.a])
        entry["against"] = [*(round(v, 3) for v in (found.value, found.low, found.high)), found.significant]
    entries.sort(key=lambda e: -e["clean"]["true_reward"][0] if "clean" in e else float("inf"))
    start = done(initial_jobs(seeds))
    return {
        "date": date.today().isoformat(), "versions": {name: version(name) for name in ("torch", "transformers")}, "seeds": seeds,
        "common": COMMON, "conditions": CONDITIONS, "rates": RATES, "factors": FACTORS, "tuning_seeds": len(TUNING_SEEDS),
        "runs": len(every), "seconds": round(sum(row["seconds"] for row in every)), "initial": figures(start) if start else None,
        "methods": entries, "left_out": left_out(),
    }  # fmt: skip


def collect(path: Path, seeds: int) -> dict[str, Any]:
    return json.loads(json.dumps(summary(read(path), all_methods(), seeds)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names of conf/algo, comma separated; all by default")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method under each condition")
    parser.add_argument("--hours", type=float, help="begin no run after so many hours; the next start goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, with one thread each")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of results.jsonl")
    parser.add_argument("--render", action="store_true", help="run nothing; write the page from docs/zoo.json")
    args = parser.parse_args(argv)
    from zoo_report import render  # beside this file

    if not args.render:
        methods = args.methods.split(",") if args.methods else all_methods()
        if unknown := [m for m in methods if m not in all_methods()]:
            why = left_out().get(unknown[0])
            said = f"is left out: it {why}" if why else f"is no algorithm{nearest(unknown[0], all_methods())}"
            print(f"--methods: {unknown[0]} {said}", file=sys.stderr)
            return 2
        from prefopt.policies.tiny_lm import ensure_tiny_lm

        ensure_tiny_lm()
        path = args.work.resolve() / "results.jsonl"
        os.environ |= {"OMP_NUM_THREADS": "1", "PREFOPT_STORE": str(path.parent / "store")}  # read by the workers
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            try:
                fill(path, methods, args.seeds, pool, args.workers, args.hours)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                print("stopped; the same command goes on", file=sys.stderr)
        (DOCS / "zoo.json").write_text(json.dumps(collect(path, args.seeds), indent=1) + "\n", encoding="utf-8")
    render(DOCS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
