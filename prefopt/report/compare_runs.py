"""From folders to runs, and from runs to methods: what may be compared, and under which names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prefopt.config.mixtures import described
from prefopt.errors import UserError, nearest
from prefopt.report import speed
from prefopt.report.compare_stats import by_seed
from prefopt.report.estimators import length_controlled, wins
from prefopt.report.plots import Row, finite, tidy
from prefopt.tracking.redact import redact
from prefopt.tracking.tracker import read_jsonl

# Keys that do not change what is learnt: they name the run, say where and how it goes, or how much is written down.
NEUTRAL = (
    "seed", "run_dir", "resume", "tracker", "hardware", "trust", "evaluation", "sampler.batch_size", "model.learning_rate",
    "model.micro_batch_tokens", "model.gradient_checkpointing", "model.share_prompts", "model.fused_head", "model.compile",
    "train.micro_batch_tokens", "train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints",
    "train.max_skipped_steps", "train.self_check", "data.on_bad_row", "reference.store", "reference.store_limit_gb",
)  # fmt: skip
NOT_NEUTRAL = ("hardware.precision",)
# What decides which rows a run learnt from and was judged on.
DATA_KEYS = (
    "name", "source", "path", "subset", "revision", "train", "eval", "limit", "eval_limit", "eval_fraction", "label_noise", "length_bias",
)  # fmt: skip
UNSET = "unset"

# Quantities with one value per sampled reply, and the field of samples.jsonl each is made from.
SAMPLED = {
    "true_reward": "reward", "win_rate": "reward", "lc_win_rate": "reward", "kl": "log_ratio", "length": "tokens", "finished": "finished",
}  # fmt: skip


# ---- one run -------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run folder as it was read. `name` is what the page calls it."""

    folder: Path
    name: str
    config: dict
    manifest: dict
    status: dict
    rows: list[dict]
    samples: dict[float, dict[Any, dict]]  # complete evaluations only: step -> prompt id -> row

    @cached_property
    def evals(self) -> list[Row]:
        return tidy(self.rows, "eval")

    @cached_property
    def train(self) -> list[Row]:
        return tidy(self.rows, "train")

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def state(self) -> str:
        return str(self.status.get("state") or "state unknown")

    @cached_property
    def step(self) -> float:
        """The last evaluation that is complete."""
        steps = [row["step"] for row in self.evals]
        return max([s for s in steps if s in self.samples] or steps)

    @cached_property
    def ids(self) -> list:
        """Prompt ids in the order in which all runs list them."""
        return sorted(self.samples.get(self.step, {}), key=lambda k: (isinstance(k, str), k))

    @property
    def prompts(self) -> list[tuple[Any, str]]:
        return [(i, str(self.samples[self.step][i].get("prompt"))) for i in self.ids]

    def values(self, key: str, step: float | None = None) -> np.ndarray | None:
        """[P] one value per prompt at an evaluation (the last); None where it was not measured."""
        step = self.step if step is None else step
        found = self._column(SAMPLED[key], step)
        if key not in ("win_rate", "lc_win_rate"):
            return found
        start = self._column("reward", 0.0)
        if found is None or start is None:
            return None
        won = wins(found, start)
        if key == "win_rate":
            return won
        ours, theirs = self._column("tokens", step), self._column("tokens", 0.0)
        return None if ours is None or theirs is None else length_controlled(won, ours - theirs)

    def _column(self, column: str, step: float) -> np.ndarray | None:
        rows = self.samples.get(step, {})
        values = [rows[i].get(column) for i in self.ids if i in rows]
        numbers = [float(v) if isinstance(v, bool) else finite(v) for v in values]
        return None if None in numbers or len(numbers) != len(self.ids) or not numbers else np.array(numbers)

    def figure(self, key: str) -> float | None:
        """A figure that has no parts: an accuracy of the last evaluation, or what the run cost."""
        if key in ("accuracy", "ranking_accuracy"):
            return next((row.get(key) for row in self.evals if row["step"] == self.step), None)
        if key == "seconds":
            return finite(self.status.get("seconds"))
        if key in ("tokens", "pictures", "samples"):  # all count up
            return max((row[key] for row in self.train if key in row), default=None)
        if key == "flops":
            return flops(self)[0]
        return speed.averages(self.status).get(key)

    def why_missing(self, key: str) -> str:
        """Why a quantity is not there, for a footnote."""
        if key in SAMPLED:
            if dig(self.config, "evaluation.prompts") == 0:
                return "evaluation.prompts=0, so nothing was sampled"
            if not self.samples:
                return "samples.jsonl is missing or holds no complete evaluation"
        if key in ("true_reward", "win_rate", "lc_win_rate"):
            if dig(self.config, "reward.kind") == "none":
                return "reward.kind=none"
            rated = sum(finite(row.get("reward")) is not None for row in self.samples[self.step].values())
            if 0 < rated < len(self.samples[self.step]):
                return "some replies have no reward"
            if key == "lc_win_rate" and self.values("win_rate") is not None:
                return "all replies are longer than the initial policy's, or all are shorter"
            return "the initial policy was not evaluated" if rated else "no reward is known for this data"
        if key == "kl":
            if dig(self.config, "evaluation.kl") is False:
                return "evaluation.kl=false"
            plain = dig(self.config, "sampler.temperature") in (1, None) and dig(self.config, "sampler.top_p") in (1, None)
            return "samples.jsonl has no log-ratios" if plain else "KL is measured on samples at temperature 1 and top_p 1 only"
        if key == "flops":
            return flops(self)[1]
        return {
            "accuracy": "the run reports no accuracy on pairs", "ranking_accuracy": "the run reports no ranking accuracy",
            "seconds": "status.json has no time", "tokens": "no training step was recorded", "pictures": "no training step was recorded",
            "samples": "trained on stored replies, none were sampled to learn from",
            "useful_mfu": "the model's FLOPs are not known", "rows_per_second": "status.json has no speed",
        }.get(key, "not recorded")  # fmt: skip


def flops(run: Run) -> tuple[float | None, str]:
    """(operations of all training steps, why they are unknown). N parameters, of which t are trained; per token

    2N forward, 2N backward to the activations, 2t to the weights (together 6N where all are trained); 2N more for a reference that
    is run along, 2N for an objective that scores every batch twice, and 2N where gradient checkpointing runs the forward pass again.
    2N per token of a reply that was sampled to learn from. Attention's quadratic part, padding, sampled prompts, reward models and
    evaluations are left out.
    """
    if run.figure("pictures") is not None:
        return None, "they do not follow from a number of weights where pictures are trained on; MFU does"
    total, trained = (finite(run.manifest.get(key)) for key in ("parameters", "trainable_parameters"))
    tokens = run.figure("tokens")
    if total is None or trained is None or tokens is None:
        return None, "no training step was recorded" if tokens is None else "the manifest has no parameter counts"
    try:
        objective = described(dig(run.config, "algo") or {}, dig(run.config, "trust.packages") or ())
    except UserError:
        return None, "the objective's source, which says whether it needs a reference, cannot be read here"
    how = str(run.manifest.get("reference") or "none")
    live = objective.needs_reference and how != "none" and "stor" not in how
    again = bool(dig(run.config, "model.gradient_checkpointing"))
    passes = 4 * total + 2 * trained + 2 * total * (live + (objective.coupling == "global") + again)
    return passes * tokens + 2 * total * sampled_tokens(run), ""


def sampled_tokens(run: Run) -> float:
    """Tokens of the replies that an online run sampled to learn from: each round's mean length times its number of replies."""
    out, before = 0.0, 0.0
    for row in run.train:
        if "samples" in row and "rollout/length" in row:
            out, before = out + (row["samples"] - before) * row["rollout/length"], row["samples"]
    return out


def dig(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


# ---- folders -------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """(runs in and below the folders, remarks on what was left out). A folder named twice counts once."""
    found: dict[Path, Path] = {}
    remarks: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            beside = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
            close = nearest(folder.name, beside)  # a list of everything else that lies there would help nobody
            raise UserError(f"{folder} is no folder; give folders of runs or of sweeps{close if 'mean' in close else ''}")
        inside = _run_folders(folder, set(), remarks)
        if not inside:
            raise UserError(f"{folder} holds no run (a folder with config.yaml and metrics.jsonl); give folders that prefopt train wrote")
        for path in inside:
            found.setdefault(path.resolve(), path)
        remarks += _sweep_remarks(folder, inside)
    if len(found) < 2:
        only = next(iter(found.values()))
        raise UserError(f"{only} is the only run there; a comparison needs two or more (one run's own page is its report.html)")
    names = _names(list(found))
    runs = [_read_run(path, names[real]) for real, path in found.items()]
    return sorted(runs, key=lambda run: run.name), list(dict.fromkeys(remarks))


def _run_folders(folder: Path, seen: set[Path], remarks: list[str]) -> list[Path]:
    """Runs in `folder` and below it. A run holds no others; links may lead in circles."""
    real = folder.resolve()
    if real in seen:
        return []
    seen.add(real)
    if (folder / "config.yaml").is_file():
        if (folder / "metrics.jsonl").is_file():
            return [folder]
        remarks.append(f"{folder.name} was left out: it has a config.yaml and no metrics.jsonl, so the run has not begun.")
        return []
    below = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name != "stages")
    return [run for f in below for run in _run_folders(f, seen, remarks)]


def _sweep_remarks(folder: Path, runs: list[Path]) -> list[str]:
    """Jobs of a sweep that left nothing to compare."""
    try:
        jobs = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        states = Counter(job["state"] for job in jobs if Path(job["run_dir"]).name not in {r.name for r in runs})
    except (OSError, ValueError, TypeError, KeyError):
        return []
    said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return [f"{sum(states.values())} of {len(jobs)} jobs of the sweep {folder.name} have no run yet ({said})."] if states else []


def _names(folders: list[Path]) -> dict[Path, str]:
    """The shortest trailing parts of the paths that tell the runs apart; no more of the machine than that."""
    for depth in range(1, max(len(f.parts) for f in folders) + 1):
        names = {f: "/".join(f.parts[-depth:]) for f in folders}
        if len(set(names.values())) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> Run:
    samples: dict[float, dict[Any, dict]] = {}
    for row in read_jsonl(folder / "samples.jsonl"):
        step, key = finite(row.get("step")), row.get("id")
        if step is not None and isinstance(key, (int, str)):
            samples.setdefault(step, {})[key] = row  # a resumed run may write rows again: the last wins
    # Of an evaluation during which the run was killed only some replies are there.
    most = max(map(len, samples.values()), default=0)
    complete = {step: rows for step, rows in samples.items() if len(rows) == most}
    config = redact(_mapping(folder / "config.yaml", needed=True))
    manifest, status = (redact(_mapping(folder / f)) for f in ("manifest.json", "status.json"))
    run = Run(folder, name, config, manifest, status, read_jsonl(folder / "metrics.jsonl"), complete)
    if not run.evals:
        raise UserError(
            f"{folder} was never evaluated (its metrics.jsonl has no row of split eval; the run's state: {run.state}); "
            "finish the run by repeating its command, or name the other folders and leave this one out"
        )
    return run


def _mapping(path: Path, needed: bool = False) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(data, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if needed:
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); leave this run out, or mend the file") from error
        return {}
    return data


# ---- may they be compared? -----------------------------------------------------------------------


def check_data(runs: Sequence[Run], allow: bool) -> list[str]:
    """What differs in the data, in words. Raises unless `allow`."""
    found = []
    for key in DATA_KEYS:
        values = {_text(dig(run.config, f"data.{key}")) for run in runs}
        if len(values) > 1:
            found.append(f"data.{key} is {' or '.join(sorted(values))}")
    for split in ("train", "eval"):
        hashes = {h for run in runs if (h := dig(run.manifest, f"data.{split}.sha256"))}
        if len(hashes) > 1:
            found.append(f"the {split} rows differ in content")
    if found and not allow:
        own = any(dig(run.config, "data.eval") is None and dig(run.config, "data.source") in ("hub", "files") for run in runs)
        fix = "; held-out rows chosen by the seed differ from seed to seed, which a fixed data.eval avoids" if own else ""
        raise UserError(
            f"the runs are over different data ({'; '.join(found)}){fix}. Compare runs over the same data, or add --different-data, "
            "which the page will say"
        )
    return found


def check_prompts(runs: Sequence[Run], allow: bool) -> bool:
    """Whether replies can be paired by prompt. Raises if the runs answered different prompts, unless `allow`.

    Where one run answered all that another did and more, both are cut to what they share.
    """
    sampled = sorted((run for run in runs if run.ids), key=lambda run: len(run.ids))
    for run in sampled[1:]:
        if run.prompts != sampled[0].prompts and not allow:
            raise UserError(
                f"{sampled[0].name} and {run.name} were evaluated on different prompts ({len(sampled[0].ids)} and {len(run.ids)} of them); "
                "compare runs with the same data and evaluation.prompts, or add --different-data, which keeps what can be kept"
            )
    if not all(set(sampled[0].prompts) <= set(run.prompts) for run in sampled):
        return False
    for run in sampled:
        run.ids = sampled[0].ids
    return True


# ---- methods -------------------------------------------------------------------------------------


@dataclass
class Method:
    """Runs that differ in nothing but the seed. `limit`: prompts used where runs answered different numbers of them."""

    label: str
    runs: list[Run]
    letter: str = ""
    limit: int | None = None
    differing: dict[str, str] = field(default_factory=dict)

    @property
    def seeds(self) -> list:
        return list(dict.fromkeys(run.seed for run in self.runs))

    def with_values(self, key: str) -> list[Run]:
        return [run for run in self.runs if run.values(key) is not None]

    def run_grid(self, key: str) -> np.ndarray:
        """[runs, P], for runs that measured it."""
        return np.stack([run.values(key)[: self.limit] for run in self.with_values(key)])

    def grid(self, key: str, step: float | None = None) -> np.ndarray | None:
        """[seeds, P] at the last evaluation, or at a step all these runs were evaluated at; None where nothing was measured."""
        runs = self.with_values(key)
        values = [run.values(key, step) for run in runs]
        if not runs or any(v is None for v in values):
            return None
        return by_seed(np.stack([v[: self.limit] for v in values]), [run.seed for run in runs])

    def steps(self, key: str) -> list[float]:
        """Evaluations that all runs with this quantity share."""
        runs = self.with_values(key)
        return sorted(set.intersection(*(set(run.samples) & {r["step"] for r in run.evals} for run in runs))) if runs else []


def group(runs: Sequence[Run], limit: int | None) -> list[Method]:
    """Methods by label. Raises if a run is there twice."""
    flat = [_leaves(run.config) for run in runs]
    shown = [_shown(own, flat) for own in flat]
    short = _short({key for keys in shown for key in keys})
    methods: dict[tuple, Method] = {}
    for run, own, keys in zip(runs, flat, shown, strict=True):
        differing = {short[key]: own.get(key, UNSET) for key in keys}
        name = str(dig(run.config, "algo.name") or "unnamed")
        label = " ".join([name, *(f"{key}={value}" for key, value in differing.items())])
        methods.setdefault((name, *differing.items()), Method(label, [], limit=limit, differing=differing)).runs.append(run)
    for method in methods.values():
        method.runs.sort(key=lambda run: (str(type(run.seed)), run.seed if isinstance(run.seed, int) else str(run.seed), run.name))
        _refuse_copies(method)
    return sorted(methods.values(), key=lambda m: m.label)


def _refuse_copies(method: Method) -> None:
    """The same seed may stand twice only where something else came out."""
    known: dict[tuple, Run] = {}
    for run in method.runs:
        results = [{k: v for k, v in row.items() if k != "seconds"} for row in run.evals]
        key = (str(run.seed), json.dumps(results), json.dumps(run.samples.get(run.step), sort_keys=True))
        other = known.setdefault(key, run)
        if other is not run:
            raise UserError(f"{other.name} and {run.name} are the same run twice (same config, seed {run.seed} and results); leave one out")


def _leaves(config: Any, prefix: str = "") -> dict[str, str]:
    """`dotted.key -> value` for everything that may make a method."""
    if not isinstance(config, dict):
        return {prefix: _text(config)}
    out: dict[str, str] = {}
    for key, value in config.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if dotted not in NEUTRAL or any(n.startswith(f"{dotted}.") for n in NOT_NEUTRAL):
            out |= _leaves(value, dotted)
    return {k: v for k, v in out.items() if k in NOT_NEUTRAL or k.partition(".")[0] not in NEUTRAL}


def _shown(own: dict[str, str], everyone: list[dict[str, str]]) -> list[str]:
    """Keys to name this run by. What follows from the name of the algorithm, model or data is not repeated."""
    keys = []
    for key in dict.fromkeys([*own, *(k for other in everyone for k in other)]):
        part = key.partition(".")[0]
        if key == "algo.name":  # every label begins with it
            continue
        peers = everyone
        if part in ("algo", "model", "data") and key != f"{part}.name":
            peers = [other for other in everyone if other.get(f"{part}.name") == own.get(f"{part}.name")]
        if part == "source" and key != "source.kind":
            if own.get("source.kind", "offline") == "offline":  # it samples nothing, so how it would does not matter
                continue
            peers = [other for other in everyone if other.get("source.kind") == own["source.kind"]]
        if len({other.get(key, UNSET) for other in peers}) > 1:
            keys.append(key)
    return keys


def _short(keys: set[str]) -> dict[str, str]:
    """algo.beta -> beta, model.name -> model, source.kind -> source; the full key where two would share a name."""
    whole = {"model.name": "model", "data.name": "data", "source.kind": "source", "reward.kind": "reward"}
    names = {key: whole.get(key) or key.rpartition(".")[2] for key in keys}
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else key for key, name in names.items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}".replace("e-0", "e-")
    return value if isinstance(value, str) else json.dumps(value, default=str)
