"""The training loop. For every method the same sentence: score the edges, let the objective turn scores into terms, take a step."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from prefopt.config.schema import TrainConfig
from prefopt.data.pictures import load_picture
from prefopt.errors import RunFailed, UserError, nearest
from prefopt.report.alarms import alarms
from prefopt.report.run_report import write_report
from prefopt.tracking.tracker import JsonlTracker, read_jsonl
from prefopt.training import checkpoint, ranks
from prefopt.training.engine import learning_rate
from prefopt.training.locks import writing
from prefopt.training.plan_text import out_of_memory
from prefopt.training.progress import Progress
from prefopt.training.replay import replay_check
from prefopt.training.rundir import manifest, read_manifest, read_status, write_atomic, write_status
from prefopt.training.selfcheck import self_check
from prefopt.training.setup import Run, make_accelerator, make_trackers, set_up
from prefopt.training.signals import StopSignals
from prefopt.training.throughput import Speed
from prefopt.training.timing import Times, straggler_lines


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Runs or continues the run in `cfg.run_dir`; returns its last evaluation. Raises `UserError` and `RunFailed`."""
    accelerator = make_accelerator(cfg)
    with writing(Path(cfg.run_dir)) if accelerator.is_main_process else nullcontext():
        return loop(set_up(cfg, accelerator))


def loop(run: Run) -> dict[str, Any]:
    """From the start or the newest checkpoint to the end."""
    cfg = run.cfg
    same_start(run)
    log = Log(run)
    step = log.resume()
    with StopSignals() as stop, log.ending():
        if step == 0 and cfg.train.self_check:
            first = run.source.step(0)
            log.checked(self_check(run.engine, first, cfg.hardware.precision, run.reference_is_initial)
                        | replay_check(run.engine, first, cfg.hardware.precision))
        if log.evaluation_due(step) and not log.evaluated(step):
            log.evaluate(step)
        while step < run.total_steps:
            run.moving(step)
            with run.engine.clock("data"):
                micros = run.source.step(step)
            result = run.engine.step(micros, learning_rate(step, run.total_steps, cfg.optim))
            step += 1
            run.moving.after(step)
            log.step(step, result)
            stopping = any_rank(run, stop.name is not None)
            if log.evaluation_due(step) and not stopping:
                log.evaluate(step)
            if log.checkpoint_due(step) or stopping:
                log.save(step)
            if stopping:
                return log.stopped(step, stop.name or "a signal on another process")
        return log.finished(step)


def same_start(run: Run) -> None:
    """A run goes on from the weights that it began with: the reference, and what an adapter lies on, are read anew at each start. Raises
    `UserError`."""
    began, now = read_manifest(run.folder).get("model", {}), run.about["model"]
    if changed := [key for key in ("fingerprint", "adapter") if key in began and began[key] != now[key]]:
        where = run.cfg.model.adapter if changed == ["adapter"] else now["where"]
        raise UserError(f"{run.folder} began with other weights than those that are now at {where}, and its reference would change on the "
                        "way. Put them back, or start anew in another hydra.run.dir.")


class Log:
    """Everything the loop writes: metrics, samples, checkpoints, status, report. Only the main process touches the disk."""

    def __init__(self, run: Run):
        self.run, self.cfg = run, run.cfg
        self.began, self.before = time.monotonic(), 0.0
        self.tokens = self.skipped = self.skipped_in_a_row = 0
        self.counted = "pictures" if run.engine.kind.layout == "draws" else "tokens"
        self.speed = Speed(run.peak, run.engine.world, run.unit, self.counted)
        self.times = Times(run.engine.world, int(os.environ.get("LOCAL_WORLD_SIZE", run.engine.world)))
        self.last: dict[str, Any] = {}
        self.warned: set[str] = set()  # alarms that were said while the run goes on
        self.best: dict[str, Any] | None = None
        self.waited = 0.0
        self.writer = checkpoint.Writer(run.folder / "checkpoints", self.cfg.train.keep_checkpoints)
        if run.main:
            if not (run.folder / "manifest.json").exists():
                write_atomic(run.folder / "manifest.json", json.dumps(manifest(run.cfg, run.about), indent=2, default=str))
            self.metrics, self.samples = JsonlTracker(run.folder / "metrics.jsonl"), JsonlTracker(run.folder / "samples.jsonl")
            print(f"run: {run.folder}", file=sys.stderr)

    @property
    def seconds(self) -> float:
        """Time spent on the run, over all its starts."""
        return self.before + time.monotonic() - self.began

    def resume(self) -> int:
        """Continues from the newest checkpoint, if there is one: the step to go on with."""
        run, step = self.run, 0
        if checkpoint.steps(run.folder / "checkpoints"):
            state = checkpoint.load(run.folder / "checkpoints", run.engine)
            step, self.before, self.tokens, self.skipped = state["step"], state["seconds"], state["tokens"], state["skipped"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
            self.speed.load(state["speed"])
            self.best = state.get("best")
        if run.main:
            self.trackers = make_trackers(run, step)
            checkpoint.clear(run.folder)
            # Rows beyond the checkpoint will be made again; a fresh start leaves none.
            self.metrics.truncate_after(step if step else -1)
            self.samples.truncate_after(step if step else -1)
            if step:
                print(f"resuming after step {step} of {run.total_steps}", file=sys.stderr)
        if step:
            first = [s for s in read_jsonl(run.folder / "samples.jsonl") if s["step"] == 0]
            if first and (run.judge.rewards or "image" in first[0]):
                run.judge.baseline = {s["id"]: self.with_image(s) for s in first}
            run.judge.reference_judged = self.evaluated(0)  # it is judged once
        self.progress = Progress(run.total_steps, step, run.main, run.unit)
        self.began = time.monotonic()
        self.status("running", step)
        self.speed.restart()
        run.engine.accelerator.wait_for_everyone()  # what the main process has cut from the files is read by the others next
        return step

    def step(self, step: int, result: Any) -> None:
        """Writes a step's row; stops the run when too many steps in a row had to be skipped."""
        ranks.at(step)
        self.tokens += int(result.effort.tokens)
        row = {
            "step": step, "seconds": self.seconds, "split": "train", "loss": result.loss, "grad_norm": result.grad_norm,
            "lr": learning_rate(step - 1, self.run.total_steps, self.cfg.optim), self.counted: self.tokens,
            **self.speed.step(result.effort, result.memory, self.run.source.waited), **self.times.add(result.times),
            **result.metrics, **self.run.source.metrics,
        }
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        self.skipped += result.skipped
        row["skipped_steps"] = self.skipped
        if self.run.main:
            if result.skipped or step % self.cfg.train.log_every == 0 or step == self.run.total_steps:
                self.write(row)
            self.progress(step, row)
        if self.skipped_in_a_row > self.cfg.train.max_skipped_steps:
            kept = checkpoint.steps(self.run.folder / "checkpoints")
            raise RunFailed(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row (up to step {step}); "
                f"{f'the last good checkpoint is {kept[-1]}' if kept else 'no checkpoint had been written'}. "
                "A lower optim.lr is the usual cure; train.max_skipped_steps sets how many are allowed."
            )

    def evaluation_due(self, step: int) -> bool:
        every = self.cfg.train.eval_every or max(1, -(-self.run.total_steps // 5))
        return step % every == 0 or step == self.run.total_steps

    def evaluated(self, step: int) -> bool:
        """Whether a run that is resumed was judged at this step before it was stopped."""
        rows = read_jsonl(self.run.folder / "metrics.jsonl")
        return any(r.get("split") == "eval" and r["step"] == step for r in rows)

    def checkpoint_due(self, step: int) -> bool:
        if self.cfg.train.save_every:
            due = step % self.cfg.train.save_every == 0 or step == self.run.total_steps
            return due or bool(self.cfg.train.keep_best and self.evaluation_due(step))
        return self.evaluation_due(step)

    def evaluate(self, step: int) -> None:
        with self.run.moving.averaged(), self.run.engine.clock.pause():
            row, samples = self.run.judge(step)
        self.last = {"step": step, "seconds": self.seconds, "split": "eval", **row}
        if (wanted := self.cfg.train.keep_best) and wanted.removeprefix("-") not in row:
            raise UserError(f"train.keep_best={wanted} is no measure of this run's evaluations{nearest(wanted.removeprefix('-'), row)}; "
                            f"there are {', '.join(sorted(row))}")
        if self.run.main:
            for sample in samples:
                self.samples.log(self.with_file(sample))
            self.write(self.last)  # after its samples: `evaluated` goes by it
            self.warn(step)
            table = sample_table(self.run.folder) if self.trackers and samples else []
            images = [(row["prompt"], row["after"]) for row in table if isinstance(row["after"], Path)]
            for tracker in self.trackers:
                tracker.log_samples(table)
                tracker.log_images(step, images)
        self.speed.restart()

    def with_file(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample as it is logged: a picture is written to a file of the run folder, and its row names it."""
        if "image" not in sample:
            return sample
        path = Path("samples") / f"step-{sample['step']:06d}" / f"{sample['id']:04d}.png"
        (self.run.folder / path).parent.mkdir(parents=True, exist_ok=True)
        sample["image"].save(self.run.folder / path)
        return {**sample, "image": str(path)}

    def with_image(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample as it was before `with_file`."""
        if "image" not in sample:
            return sample
        return {**sample, "image": load_picture({"path": str(self.run.folder / sample["image"])})}

    def checked(self, measured: dict[str, float]) -> None:
        """Writes what the self-check measured before the first step, for the alarms."""
        if self.run.main:
            self.metrics.log({"step": 0, "seconds": self.seconds, "split": "check", **measured})

    def warn(self, step: int) -> None:
        """One line per alarm, once, at the evaluation that shows it; `close` explains those that last."""
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress line is not ended
        for alarm in alarms(read_jsonl(self.run.folder / "metrics.jsonl")):
            if alarm.name not in self.warned:
                print(f"{clear}ALARM after step {step}: {alarm.title} ({alarm.link})", file=sys.stderr, flush=True)
            self.warned.add(alarm.name)

    def save(self, step: int) -> None:
        """Copies what a checkpoint holds; it is written while training goes on."""
        if self.skipped_in_a_row == 0:
            began = time.monotonic()
            with self.run.engine.clock("checkpoint"):
                self.written()
                snapshot = checkpoint.take(self.run.engine, {
                    "step": step, "seconds": self.seconds, "tokens": self.tokens, "skipped": self.skipped,
                    "skipped_in_a_row": self.skipped_in_a_row, "threads": torch.get_num_threads(), "speed": self.speed.state(),
                    "best": self.best_of(step),
                })
            if snapshot is not None:
                self.writer.start(snapshot)
                self.waited = round(time.monotonic() - began, 4)
        self.status("running", step)
        self.speed.restart()

    def written(self) -> None:
        """Waits for a checkpoint that is being written, and logs its size and its time (checkpoints/log.jsonl)."""
        if self.run.main and (done := self.writer.wait()):
            with open(self.run.folder / "checkpoints" / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps({**done, "waited_seconds": self.waited}) + "\n")

    def best_of(self, step: int) -> dict[str, Any] | None:
        """The evaluation so far with the best `train.keep_best`, whose checkpoint is kept: measure, value and step."""
        if (wanted := self.cfg.train.keep_best) and self.last.get("step") == step:
            name, sign = wanted.removeprefix("-"), -1 if wanted.startswith("-") else 1
            value = self.last[name]
            if math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"]):
                self.best = {"measure": wanted, "value": value, "step": step}
        return self.best

    def stopped(self, step: int, signal_name: str) -> dict[str, Any]:
        self.close("stopped", step, f"stopped by {signal_name}; the same command continues it")
        return {**self.last, "stopped": signal_name}

    def finished(self, step: int) -> dict[str, Any]:
        with self.run.engine.parallel.whole():
            if self.run.main:
                with checkpoint.naming(self.run.folder / "model"), self.run.moving.averaged():
                    self.run.engine.policy.save(self.run.folder / "model")
        self.close("finished", step, "")
        return self.last

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A run that fails says so in its status and its report."""
        try:
            yield
        except BaseException as error:
            said = out_of_memory(self.run, error)
            if self.run.main:
                step = read_status(self.run.folder).get("step", 0)
                if isinstance(error, KeyboardInterrupt):  # a second signal, which does not wait for the step to end
                    self.close("stopped", step, "interrupted; the same command continues from the last checkpoint")
                else:
                    self.close("failed", step, said or f"{type(error).__name__}: {error}")
            if said:
                raise RunFailed(said) from error
            raise

    def close(self, state: str, step: int, message: str) -> None:
        """Final status, report and trackers; tells the user what to look at."""
        if not self.run.main:
            return
        self.written()
        self.status(state, step, message)
        report = write_report(self.run.folder)
        for tracker in self.trackers:
            tracker.log_report(report)
            tracker.close(state)
        self.metrics.close()
        self.samples.close()
        for alarm in alarms(read_jsonl(self.run.folder / "metrics.jsonl")):
            print(f"ALARM {alarm.title}: {alarm.explanation}\nSee {alarm.link}", file=sys.stderr)
        for line in straggler_lines(self.times.averages()):
            print(line, file=sys.stderr)
        if state == "stopped":
            print(f"after step {step}: {message} (with hydra.run.dir={self.run.folder})", file=sys.stderr)
        print(f"report: {report}", file=sys.stderr)

    def status(self, state: str, step: int, message: str = "") -> None:
        if self.run.main:
            write_status(self.run.folder, state, step, self.run.total_steps, self.seconds, message, self.speed.averages(),
                         self.times.averages())

    def write(self, row: dict[str, Any]) -> None:
        self.metrics.log(row)
        for tracker in self.trackers:
            tracker.log(row)


def any_rank(run: Run, flag: bool) -> bool:
    """Whether any process was asked to stop; all must agree, or they would wait for each other for ever."""
    return bool(run.engine.sum_over_ranks(torch.tensor(float(flag))))


def sample_table(folder: Path) -> list[dict[str, Any]]:
    """Samples of the last evaluation beside those of step 0, for trackers. A sample is a text, or a `Path` for a row that names an
    `image` (a file in the run folder)."""
    rows = read_jsonl(folder / "samples.jsonl")
    what = {(r["step"], r["id"]): folder / r["image"] if r.get("image") else r["completion"] for r in rows}
    last = max((r["step"] for r in rows), default=0)
    return [
        {"id": r["id"], "step": last, "prompt": r["prompt"], "before": what.get((0, r["id"])), "after": what[last, r["id"]],
         "reward": r["reward"]}
        for r in rows if r["step"] == last
    ]
