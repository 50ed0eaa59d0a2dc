"""Hyper-parameter search by Optuna, whose trials are jobs of a sweep: its suggestions, its pruning, and a study that survives a kill.

The search space is what Hydra's sweep syntax says: choices (`a,b`), `range(16,65,16)`, `interval(0.1,1)`, `int(interval(1,8))` and
`tag(log,interval(1e-6,1e-4))`. Trials are told the metric at each evaluation; a trial that is pruned gets SIGTERM and keeps its checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from prefopt.errors import UserError, nearest
from prefopt.launch.board import BEFORE, FAILED, Board, last_rows, only_one
from prefopt.launch.jobs import Given, Job
from prefopt.tracking.redact import redact
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.rundir import write_atomic

if TYPE_CHECKING:
    import optuna

SAMPLERS, PRUNERS, DIRECTIONS = ("tpe", "random", "grid"), ("none", "median", "asha"), ("maximize", "minimize")
BEST = "best.json"


@dataclass
class Settings:
    """`hydra.sweeper`; conf/hydra/sweeper/prefopt-optuna.yaml explains each."""

    metric: str
    direction: str
    trials: int
    sampler: str
    seed: int
    startup_trials: int
    pruner: str
    warmup: int
    reduction_factor: int

    def __post_init__(self) -> None:
        for key, known in (("direction", DIRECTIONS), ("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if (value := str(getattr(self, key))) not in known:
                raise UserError(f"hydra.sweeper.{key}={value} is none of {', '.join(known)}{nearest(value, known)}")
        for key, least in (("trials", 1), ("startup_trials", 1), ("warmup", 1), ("reduction_factor", 2), ("seed", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise UserError(f"hydra.sweeper.{key}={value} must be a whole number, at least {least}")


class OptunaSweeper(Sweeper):
    """`prefopt train -m sweep=optuna`: as many jobs as `trials`, whose swept values Optuna chooses."""

    def __init__(self, params: dict[str, Any] | None = None, **settings: Any):
        self.settings, self.params = Settings(**settings), params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError("sweep=optuna needs the package optuna: pip install 'prefopt[optuna]'") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(words)
        overrides = list({override.get_key_element(): override for override in overrides}.values())  # the last word about a key counts
        space = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
        if not space:
            raise UserError("sweep=optuna has nothing to search: give a key several values, as in algo.beta=0.05,0.1,0.5 or "
                            "'optim.lr=tag(log,interval(1e-6,1e-4))'")
        grid = [values_of(o) for o in space.values()] if self.settings.sampler == "grid" else []
        if math.prod(map(len, grid)) > self.settings.trials:
            raise UserError(f"the grid has {math.prod(map(len, grid))} points and hydra.sweeper.trials={self.settings.trials} would leave "
                            "some out; raise it, or use hydra.sweeper.sampler=tpe")
        distributions = {key: distribution(o, listed=bool(grid)) for key, o in space.items()}
        fixed = [o.input_line for o in overrides if not o.is_sweep_override()]
        self.launcher.compose([*fixed, *(f"{key}={first_of(d)}" for key, d in distributions.items())], 0)  # a mistake shows before all else
        with only_one(self.launcher.sweep):
            OmegaConf.save(self.config, self.launcher.sweep / "multirun.yaml")
            board = self.launcher.open_board()
            search = Search(self.settings, self.launcher, board, fixed, distributions)
            for point in product(*grid) if grid else ():
                search.study.enqueue_trial(dict(zip(space, point, strict=True)), skip_if_exists=True)
            try:
                self.launcher.run(search, board)
            finally:
                search.say_best()


class Search(Given):
    """The queue of a search: a job is made when there is room for it. Job n is what trials with the attribute `job` = n ran."""

    def __init__(self, settings: Settings, launcher: Any, board: Board, fixed: list[str], distributions: dict[str, Any]):
        self.settings, self.launcher, self.board, self.fixed, self.distributions = settings, launcher, board, fixed, distributions
        self.study = open_study(settings, board.sweep, fixed, distributions)
        self.trials: dict[int, optuna.Trial] = {}  # of jobs that run, by their number
        self.seen: dict[int, int] = {}  # the last step that was reported, by job
        self.known = False  # whether the metric was in an evaluation
        self.again = deque(self._left())

    def _left(self) -> list[Any]:
        """Trials of an earlier start: those that were stopped go on; failed ones are put in line with the same values."""
        import optuna

        states, left = optuna.trial.TrialState, []
        last = {trial.user_attrs["job"]: trial for trial in self.study.get_trials() if "job" in trial.user_attrs}
        for number, trial in sorted(last.items()):
            if trial.state == states.RUNNING:
                left.append(optuna.trial.Trial(self.study, trial._trial_id))
                self.seen[number] = max(trial.intermediate_values, default=0)
            elif trial.state == states.FAIL and self.launcher.retry_failed:
                self.study.enqueue_trial(trial.params, user_attrs={"job": number})
        return left

    def next(self) -> Job | None:
        """The next job: one that was left, or one with values that Optuna suggests from what is known by now."""
        while True:
            trial = self.again.popleft() if self.again else self._ask()
            if trial is None:
                return None
            number = trial.user_attrs["job"]
            words = [*self.fixed, *(f"{key}={trial.params[key]}" for key in self.distributions)]
            try:
                job = self.launcher.compose(words, number)
            except UserError as error:  # of these values together; the others may go well
                self.board.add(number, words, "")
                self.board.set(number, "failed", str(error))
                self._tell(trial, None)
                continue
            self.board.add(number, words, job.cfg.run_dir)
            self.launcher.adopt(self.board, job)
            job.label = " ".join(words[len(self.fixed) :])
            self.trials[number] = trial
            return job

    def _ask(self) -> Any:
        import optuna

        waiting = self.study.get_trials(states=(optuna.trial.TrialState.WAITING,))
        made = len({t.user_attrs["job"] for t in self.study.get_trials() if "job" in t.user_attrs})
        retries = [t for t in waiting if "job" in t.user_attrs]
        if not retries and (made >= self.settings.trials or self.settings.sampler == "grid" and not waiting):
            return None
        self.study.sampler = sampler(self.settings, len(self.study.get_trials()))
        trial = self.study.ask(self.distributions)
        if "job" not in trial.user_attrs:
            trial.set_user_attr("job", made)
        return trial

    def look(self, job: Job) -> str:
        trial, last = self.trials[job.number], self.seen.get(job.number, 0)
        for row in last_rows(Path(job.cfg.run_dir) / "metrics.jsonl"):
            if row.get("split") != "eval" or row["step"] <= last:
                continue
            self.seen[job.number] = row["step"]
            value = self._value(row)
            if self.settings.metric not in row and not self.known:
                raise UserError(self._unknown([row]))
            self.known = True
            if value is None:
                continue
            trial.report(value, row["step"])
            if trial.should_prune():
                return f"{self.settings.metric}={value:.4g} at step {row['step']} is not among the better trials ({self.settings.pruner})"
        return ""

    def _value(self, row: dict[str, Any]) -> float | None:
        return finite(row.get(self.settings.metric))

    def _unknown(self, rows: list[dict[str, Any]]) -> str:
        known = sorted({key for row in rows for key in row if finite(row[key]) is not None} - {"step", "seconds"})
        return (f"hydra.sweeper.metric={self.settings.metric} has no value in the evaluations of the jobs; these have: "
                f"{', '.join(known) or 'none'}")

    def ended(self, job: Job, state: str, message: str) -> tuple[str, str]:
        import optuna

        trial = self.trials.pop(job.number)
        rows = [row for row in read_jsonl(Path(job.cfg.run_dir) / "metrics.jsonl") if row.get("split") == "eval"]
        value = self._value(rows[-1]) if rows else None
        if state == "finished" and value is None:
            state, message = "failed", self._unknown(rows[-1:])
        if state == "finished":
            self._tell(trial, value)
            self.write_best()
            return state, message if message == BEFORE else f"{self.settings.metric}={value:.6g}"
        if state == "pruned":
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif state in FAILED:
            self._tell(trial, None)
        return state, message  # a stopped trial stays open and goes on later

    def _tell(self, trial: Any, value: float | None) -> None:
        """The value of a trial; None: it failed."""
        import optuna

        self.study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)

    def write_best(self) -> None:
        best = self.study.best_trial
        job = self.board.jobs[best.user_attrs["job"]]
        about = {"job": best.user_attrs["job"] + 1, "metric": self.settings.metric, "direction": self.settings.direction,
                 "value": best.value, "params": best.params, "run_dir": job["run_dir"], "overrides": job["overrides"]}
        write_atomic(self.board.sweep / BEST, json.dumps(redact(about), indent=2))

    def say_best(self) -> None:
        try:
            best = json.loads((self.board.sweep / BEST).read_text())
        except FileNotFoundError:
            return
        values = " ".join(f"{key}={value}" for key, value in best["params"].items())
        print(f"best: {best['metric']}={best['value']:.6g} with {values} (job {best['job']}, {best['run_dir']})")


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def open_study(settings: Settings, sweep: Path, fixed: list[str], distributions: dict[str, Any]) -> Any:
    """The study in the sweep's folder, new or as it was left. Raises `UserError` if it is another search."""
    import optuna

    about = redact({"metric": settings.metric, "direction": settings.direction, "fixed": fixed,
                    "space": {key: repr(d) for key, d in distributions.items()}})
    pruner = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(settings.startup_trials, settings.warmup),
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(settings.warmup, settings.reduction_factor),
    }[settings.pruner]()
    study = optuna.create_study(storage=f"sqlite:///{sweep.absolute()}/study.db", study_name="sweep", load_if_exists=True,
                                direction=settings.direction, pruner=pruner)
    for key, value in about.items():
        if (known := study.user_attrs.get(key, value)) != value:
            raise UserError(f"{sweep} holds another search ({key} is {known} there, and {value} here); choose another hydra.sweep.dir")
        study.set_user_attr(key, value)
    return study


def sampler(settings: Settings, number: int) -> Any:
    """Seeded by (seed, number of the trial), so that a search that was stopped goes on as it would have."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=settings.startup_trials, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # of a grid, all points are in line already


def distribution(override: Override, listed: bool) -> Any:
    """Optuna's distribution of a swept key; `listed`: of nothing but its values, as words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, key = override.value(), override.get_key_element()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if listed:
            return CategoricalDistribution(values_of(override))
        if isinstance(sweep, IntervalSweep):
            kind = IntDistribution if isinstance(sweep.start, int) and isinstance(sweep.end, int) else FloatDistribution
            return kind(sweep.start, sweep.end, log=log)
        if isinstance(sweep, RangeSweep):
            values = [json.loads(text) for text in values_of(override)]
            if log:
                raise ValueError("a range has no logarithm; use tag(log,interval(...))")
            kind = IntDistribution if all(isinstance(v, int) for v in values) else FloatDistribution
            return kind(min(values), max(values), step=abs(sweep.step))
        return CategoricalDistribution(values_of(override))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {str(error).rstrip('.')} ({key} cannot be searched like this)") from error


def values_of(override: Override) -> list[str]:
    """All values of a swept key, as words of a command line."""
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: a grid needs values that can be counted; use range(...) or a list of values, or "
                        "hydra.sweeper.sampler=tpe")
    return list(override.sweep_string_iterator())


def first_of(distribution: Any) -> Any:
    """A value of a distribution."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low
