"""One side of the benchmark in a process of its own: `python scripts/bench_worker.py JOB.json`. Writes what it measured to the job's `out`.

A job trains one or more objectives in turn, for the same number of steps: times are taken at the end of each optimiser step. Both sides
train through what their users call (prefopt's `train` command, TRL's trainers); neither evaluates, logs or saves before its last step.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# TRL's name for each objective: trainer, loss type, names of the parameters.
TRL = {
    "dpo": ("DPO", "sigmoid", {"beta": "beta"}),
    "ipo": ("DPO", "ipo", {"tau": "beta"}),
    "simpo": ("CPO", "simpo", {"beta": "beta", "gamma": "simpo_gamma"}),
}


@dataclass
class Clock:
    """What one run took. Times are seconds since `begin`."""

    cuda: bool
    begin: float
    ends: list[float] = field(default_factory=list)  # of steps
    cpu_ends: list[float] = field(default_factory=list)  # the same in seconds of computing, over all threads
    losses: list[float] = field(default_factory=list)
    logps: dict[str, float] = field(default_factory=dict)  # first step: mean log-prob of chosen and of rejected replies, nats
    reference: float = 0.0  # spent on the reference before the first step
    steps_begin: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.time() - self.begin

    def stepped(self) -> None:
        self.ends.append(self.now())
        self.cpu_ends.append(time.process_time())

    def result(self) -> dict[str, Any]:
        return {"ends": self.ends, "cpu_ends": self.cpu_ends, "losses": self.losses, "logps": self.logps,
                "reference_seconds": self.reference, "steps_begin": self.steps_begin, **self.extra}  # fmt: skip


class Done(Exception):
    """The last step is over: what would follow (checkpoint, report) is not measured."""


def peak_memory(cuda: bool) -> dict[str, int]:
    """Bytes: the most that the process has held so far, or on a GPU the most that tensors took and that was reserved for them."""
    if cuda:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return {"peak_bytes": int(line.split()[1]) * 1024}
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


# ---- prefopt ---------------------------------------------------------------------------------------


def run_prefopt(job: dict[str, Any], objective: dict[str, Any], clock: Clock) -> None:
    """`prefopt train`, watched at the end of each step."""
    from prefopt.launch.app import run

    folder = Path(job["work"]) / f"run-{os.getpid()}-{random.randrange(1 << 30)}"
    settings = {k: v for k, v in objective.items() if k != "name"}
    words = [
        f"hydra.run.dir={folder}", f"algo={objective['name']}", *(f"algo.{k}={_word(v)}" for k, v in settings.items()),
        f"model={job['shape_model']}", f"model.path={job['model']}", "data=jsonl", f"data.path={job['rows']['prefopt']}",
        "data.eval_fraction=0", f"hardware={'auto' if clock.cuda else 'cpu'}", f"hardware.threads={job['threads']}",
        f"hardware.precision={job['precision']}", f"train.batch_size={job['batch']}", f"train.steps={job['steps']}",
        "evaluation.prompts=0", "evaluation.kl=false", f"train.eval_every={10**9}", f"train.save_every={10**9}",
        f"optim.lr={job['lr']}", "optim.schedule=constant", "optim.warmup=0", *job["overrides"],
    ]  # fmt: skip
    with watched(job, clock), suppress(Done):
        run("train", words)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [r for r in rows if r["split"] == "eval" and r.keys() - {"step", "split", "seconds"}]
    if judged or list(folder.glob("checkpoints/*")):
        raise SystemExit(f"prefopt evaluated or saved before its last step ({judged[:1]}), which TRL did not: the times do not compare")
    clock.extra["manifest"] = {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items()
                               if k in ("scoring", "reference", "precision", "threads", "peak")}  # fmt: skip


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def watched(job: dict[str, Any], clock: Clock) -> Iterator[None]:
    """Times the reference and the steps of the run inside, and ends it after the last one."""
    from prefopt.training import engine, setup, source

    step, references, split = engine.Engine.step, setup.make_references, source.split_step

    def timed_step(self: Any, micros: Any, lr: float) -> Any:
        if not clock.ends:
            clock.extra["micro_batches"] = len(micros)
        result = step(self, micros, lr)
        clock.stepped()
        clock.losses.append(result.loss)
        clock.extra.setdefault("efforts", []).append(asdict(result.effort))
        if not clock.logps:
            clock.logps = {name: float(result.metrics[f"logp/{name}"]) for name in ("chosen", "rejected")}
        if len(clock.ends) == job["steps"]:
            if job.get("fit"):
                clock.extra["fit"] = fit(lambda count, length: prefopt_holds(self, micros[0], count, length), job["fit"])
            raise Done
        return result

    def timed_references(*args: Any, **kwargs: Any) -> Any:
        began = clock.now()
        out = references(*args, **kwargs)
        clock.reference = clock.now() - began
        return out

    def in_data_order(rows: Any, chosen: Any, view: str, budget: int, world: int, *rest: Any, **more: Any) -> list[list[list[int]]]:
        """Micro-batches of so many pairs, whatever their lengths, as a plain data loader makes them."""
        size = job["pairs_per_micro"]
        return [[list(chosen[i : i + size]) for i in range(0, len(chosen), size)]]

    before = engine.Engine._backward_local

    def first(self: Any, *args: Any) -> Any:
        clock.steps_begin = clock.steps_begin or clock.now()
        return before(self, *args)

    engine.Engine.step, setup.make_references, engine.Engine._backward_local = timed_step, timed_references, first
    if job.get("pairs_per_micro"):
        source.split_step = in_data_order
    try:
        yield
    finally:
        engine.Engine.step, setup.make_references, source.split_step = step, references, split
        engine.Engine._backward_local = before


# ---- TRL -------------------------------------------------------------------------------------------


def make_trainer(job: dict[str, Any], objective: dict[str, Any], clock: Clock) -> Any:
    """TRL's trainer with its own defaults but for what the benchmark fixes: precision, rows and their order, batch, learning rate."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer, loss, names = TRL[objective["name"]]
    kind, config = {"DPO": (DPOTrainer, DPOConfig), "CPO": (CPOTrainer, CPOConfig)}[trainer]
    options = dict(job["trl"])
    micro = min(options.pop("micro", 8), job["batch"])
    if trainer == "CPO":
        options |= {"cpo_alpha": 0.0}
        options.pop("precompute_ref_log_probs", None)
    options |= {theirs: objective[ours] for ours, theirs in names.items()}

    class Timed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.steps_begin = clock.steps_begin or clock.now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.stepped()
            if not clock.logps and trainer == "DPO":  # under SimPO the CPO trainer's are means over tokens
                for name in ("chosen", "rejected"):
                    values = made._metrics["train"][f"logps/{name}"]
                    clock.logps[name] = sum(values) / len(values)

    class Watched(kind):  # type: ignore[misc, valid-type]
        seen: list[Any] = []

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.seen.append(loss.detach())
            return loss

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = clock.now()
            out = super()._precompute_ref_logps(*args, **kwargs)
            clock.reference = clock.now() - began
            return out

    Watched.seen = []
    args = config(
        output_dir=f"{job['work']}/trl", report_to="none", use_cpu=not clock.cuda, bf16=job["precision"] == "bf16", loss_type=loss,
        max_length=8192, per_device_train_batch_size=micro, gradient_accumulation_steps=job["batch"] // micro, max_steps=job["steps"],
        learning_rate=job["lr"], lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    rows = [json.loads(line) for line in Path(job["rows"]["trl"]).read_text().splitlines()]
    peft = {}
    if job.get("lora"):
        from peft import LoraConfig

        peft["peft_config"] = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    # A model that is given as an object keeps the frozen weights' type under LoRA; trained weights are float32 on both sides.
    dtype = torch.bfloat16 if job.get("lora") and job["precision"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    made = Watched(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                   callbacks=[Timed()], **peft)  # fmt: skip
    return made


def run_trl(job: dict[str, Any], objective: dict[str, Any], clock: Clock) -> None:
    trainer = make_trainer(job, objective, clock)
    trainer.train()
    micros = trainer.args.gradient_accumulation_steps
    seen = [float(x) for x in trainer.seen]
    clock.losses = [sum(seen[i : i + micros]) / micros for i in range(0, len(seen), micros)]
    clock.extra["micro_batches"] = micros
    if job.get("fit"):
        clock.extra["fit"] = fit(lambda count, length: trl_holds(trainer, count, length), job["fit"])


def search(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """TRL's micro-batch that scores and differentiates the first step's pairs soonest: seconds by its size; those that did not fit are
    left out."""
    trainer = make_trainer({**job, "trl": {**job["trl"], "micro": 1}}, job["objectives"][0], clock)
    model, rows = trainer.model.to(trainer.accelerator.device), [trainer.train_dataset[i] for i in range(job["batch"])]
    model.train()

    def work(part: list[Any]) -> None:
        inputs = trainer._prepare_inputs(trainer.data_collator(part))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        trainer.accelerator.backward(loss)

    trainer._signature_columns = None
    work(rows[:1])
    seconds = {}
    for size in [s for s in (1, 2, 4, 8, 16, 32) if s <= job["batch"]]:
        try:
            began = clock.now()
            for i in range(0, len(rows), size):
                work(rows[i : i + size])
            seconds[size] = clock.now() - began
        except torch.OutOfMemoryError:
            break
        finally:
            model.zero_grad()
    return {"search": seconds}


# ---- what fits -------------------------------------------------------------------------------------


def largest(holds: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest size, to one eighth, that holds: doubled until one does not, then halved in. 0 if not even `start` does."""
    good, bad = 0, start
    while bad <= limit and holds(bad):
        good, bad = bad, bad * 2
    while good and bad - good > max(good // 8, 1) and bad <= limit:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def fit(attempt: Callable[[int, int], None], limits: dict[str, int]) -> dict[str, int]:
    """After a first step, so that optimiser states are there: how many pairs of 1,024 tokens (512 of prompt, 512 of each reply) one
    forward and backward pass holds, and how long a single pair may be (three quarters prompt)."""

    def holds(count: int, length: int) -> bool:
        try:
            attempt(count, length)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return {"pairs": largest(lambda n: holds(n, 1024), 1, limits["pairs"]),
            "context": largest(lambda n: holds(-1, n), 1024, limits["context"])}  # fmt: skip


def made_up(count: int, length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) ids of `count` pairs of prompt + reply = `length`; a count of -1 means one with a long prompt."""
    rng, prompt = random.Random(0), length // 2 if count > 0 else length * 3 // 4
    return [tuple([rng.randrange(3, 40_000) for _ in range(n)] for n in (prompt, length - prompt, length - prompt))
            for _ in range(abs(count))]  # fmt: skip


def prefopt_holds(engine: Any, like: Any, count: int, length: int) -> None:
    from prefopt.data.batch import Row, build
    from prefopt.data.tokenise import Branch, Tokens
    from prefopt.training.metrics import Averages

    stored = {scorer: [0.0, 0.0] for scorer in like.stored}
    rows = [Row(Tokens(prompt, [Branch(ids, [True] * len(ids), True) for ids in replies]), "pair", stored=stored)
            for prompt, *replies in made_up(count, length)]  # fmt: skip
    micro = build(rows, list(range(len(rows))), "pairs", engine.policy.pad)
    try:
        engine._backward_local([micro], Averages())
    finally:
        engine.optimizer.zero_grad()


def trl_holds(trainer: Any, count: int, length: int) -> None:
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
            for p, c, r in made_up(count, length)]  # fmt: skip
    trainer.data_collator.max_length = None
    try:
        trainer.training_step(trainer.model_wrapped, trainer.data_collator(rows))
    finally:
        trainer.optimizer.zero_grad()


# ---- the process -----------------------------------------------------------------------------------


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    cuda = job["device"] == "cuda"
    if job["side"] == "search":
        out = search(job, Clock(cuda, time.time()))
    else:
        run = {"prefopt": run_prefopt, "trl": run_trl}[job["side"]]
        runs = []
        for number, objective in enumerate(job["objectives"]):
            clock = Clock(cuda, job["started"] if number == 0 else time.time())
            run(job, objective, clock)
            runs.append(clock.result())
            gc.collect()  # the run's model, before the next one's is loaded
        out = {"runs": runs, **peak_memory(cuda)}
    Path(job["out"]).write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and worker threads of libraries may take their time
