"""Kills training runs with SIGKILL, lets them resume, and compares what they come to with a run that nobody killed.

    make torture                                                   30 kills of one process, 30 of two
    .venv/bin/python scripts/torture.py --kills 8 --processes 1 --seed 3 --folder runs/again

Half of the kills come at a random time, to all processes at once. The others come from inside one of them, just before it opens for
writing, renames or removes a file of the run or of its store; for half of these the file that is being written is cut short first, as a
kill in the middle of a write leaves it. A run may be killed several times, its resumes too, before it is let through. Then nothing may
tell it from the run that was not killed: weights, optimiser, samples, metrics but times, names of files. On one process every bit is the
same; on two, numbers may differ by `TOLERANCE`. Writes FOLDER/summary.json and ends with 1 if a run came to something else.

Processes are forked from this one, which has everything imported: a run takes a second, so that thirty take minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

SMALL = ["data.limit=32", "data.eval_limit=8", "evaluation.prompts=4", "train.batch_size=8", "hardware.threads=1"]
SHORT_REPLIES = ["sampler.max_new_tokens=24", "source.prompts=8"]
CASES = {
    "dpo": ["algo=dpo", "train.steps=8", "train.eval_every=4", "train.save_every=2", "train.micro_batch_tokens=256"],
    "online_dpo": ["algo=online_dpo", "source.epochs=2", *SHORT_REPLIES, "train.steps=6", "train.eval_every=3", "train.save_every=1"],
}
# What a row says of the machine, or of the steps and evaluations since the last start.
MEASURED = {"seconds", "rows_per_second", "tokens_per_second", "useful_mfu", "hardware_mfu", "peak_memory", "padding", "rollout/seconds"}
TOLERANCE = 2e-5  # of a weight, between two processes that are killed and two that are not
PATIENCE = 120.0  # seconds for a run of seconds: what takes longer hangs


# ---- one run --------------------------------------------------------------------------------------------


def words_of(case: str, folder: Path, processes: int) -> list[str]:
    return [*CASES[case], *SMALL, f"hardware={'2xcpu' if processes == 2 else 'cpu'}", f"hydra.run.dir={folder / 'run'}"]


class Group:
    """A run's processes: the command itself for one; for more, what launcher and workers do, by fork."""

    def __init__(self, case: str, folder: Path, processes: int, inside: Callable[[int], None] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        words, self.began = words_of(case, folder, processes), time.monotonic()
        self.codes: dict[int, int] = {}  # of those that have ended
        os.environ["PREFOPT_STORE"] = str(folder / "store")
        if processes == 1:
            from prefopt.cli import main

            self.pids = [fork(folder, lambda: main(["train", *words]), 0, inside)]
            return
        from prefopt.training.rundir import claim

        cfg = self.cfg = composed(words, folder / "run")
        if claim(cfg, case) == "finished":
            self.pids = []
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"PREFOPT_CONFIG": json.dumps(asdict(cfg)), "PREFOPT_ARGV": json.dumps(["train", *words]), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}

        def work(rank: int) -> int:
            from prefopt.launch import worker

            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            return worker.main()

        self.pids = [fork(folder, lambda rank=rank: work(rank), rank, inside) for rank in range(processes)]

    def kill(self) -> None:
        """All of it at once, the launcher too."""
        for pid in set(self.pids) - self.codes.keys():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def wait(self, until: float = PATIENCE) -> list[int]:
        """Exit codes, negative for signals; where one fails the launcher ends the others. Empty: not yet done."""
        codes = self.codes
        while len(codes) < len(self.pids) and time.monotonic() < self.began + until:
            for pid in set(self.pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if any(codes.values()):
                for pid in set(self.pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        if len(codes) < len(self.pids):
            if until >= PATIENCE:
                self.kill()
            return []
        if len(self.pids) > 1:
            from prefopt.training.rundir import release

            release(Path(self.cfg.run_dir))
        return [codes[pid] for pid in self.pids]


def fork(folder: Path, work: Callable[[], int], rank: int, inside: Callable[[int], None] | None) -> int:
    """A process of its own that does `work`; what it says goes to log-RANK.txt."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        if inside:
            inside(rank)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def composed(words: list[str], run: Path) -> Any:
    """The config that `prefopt train` makes of its words."""
    from hydra import compose, initialize_config_module

    from prefopt.config.compose import typed

    with initialize_config_module("prefopt.conf", version_base="1.3"):
        cfg = compose("train", [w for w in words if not w.startswith("hydra.")] + [f"run_dir={run}"])
    return typed(cfg, "train", next(w.removeprefix("algo=") for w in words if w.startswith("algo=")))


def import_all(folder: Path) -> None:
    """Imports here what a run imports, as a first run tells. No run is made in this process: autograd does not survive a fork."""

    def tell() -> int:
        from prefopt.cli import main

        code = main(["train", *words_of("online_dpo", folder, 1)])
        (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))
        return code

    folder.mkdir(parents=True)
    os.environ["PREFOPT_STORE"] = str(folder / "store")
    if os.waitpid(fork(folder, tell, 0, None), 0)[1]:
        raise SystemExit(f"the first run failed; see {folder}/log-0.txt")
    for name in json.loads((folder / "modules.json").read_text()):
        if name.partition(".")[0] in ("prefopt", "torch", "transformers", "accelerate", "deepspeed", "jinja2", "PIL", "peft"):
            with suppress(Exception):  # some exist in a run only
                importlib.import_module(name)


# ---- kills ----------------------------------------------------------------------------------------------


def watch(folder: Path, seen: Callable[[str, str], None]) -> None:
    """Calls `seen(event, path)` before a file of `folder` is opened for writing, renamed, removed, or touched."""
    busy = False

    def hook(event: str, args: tuple) -> None:
        nonlocal busy
        if busy or not (event == "open" or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree")):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = args[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(f"{folder}{os.sep}") and "/log-" not in path:
            busy = True
            try:
                seen(event, path)
            finally:
                busy = False

    sys.addaudithook(hook)


def strike(folder: Path, rank: int, number: int, tear: float | None) -> Callable[[int], None]:
    """Ends process `rank` with SIGKILL at its `number`th change of a file of the folder, the newest file cut at `tear` of what it has."""

    def inside(own: int) -> None:
        left = number if own == rank else 0

        def seen(event: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                cut = torn(folder, tear) if tear is not None else ""
                (folder / "kill.json").write_text(json.dumps({"event": event, "path": os.path.relpath(path, folder), "cut": cut}))
                os.kill(os.getpid(), signal.SIGKILL)

        watch(folder, seen)

    return inside


def torn(folder: Path, share: float) -> str:
    """Cuts what was written last, if a kill could have cut it: a file under a temporary name, or the last row of one that rows are
    appended to."""
    newest = max((f for f in folder.rglob("*") if f.is_file() and f.suffix != ".txt"), key=lambda f: f.stat().st_mtime_ns, default=None)
    if newest is None:
        return ""
    name, size = os.path.relpath(newest, folder), newest.stat().st_size
    if ".part" in name:
        os.truncate(newest, int(share * size))
    elif name in ("run/metrics.jsonl", "run/samples.jsonl"):
        *_, last = newest.read_bytes().splitlines(keepends=True) or [b""]
        os.truncate(newest, size - len(last) + int(share * len(last)))
    else:
        return ""
    return name


def where(path: str) -> str:
    """What a kill met, for the summary."""
    for part in ("checkpoints", "store", "rounds", "model"):
        if f"/{part}/" in f"/{path}/" or f"/{part}." in f"/{path}":
            return part
    return Path(path).name.lstrip(".").removesuffix(".part")


# ---- the comparison ---------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict]:
    """What must be the same."""
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED and not k.startswith("time/")}
            for line in path.read_text().splitlines()]


def differences(whole: Path, run: Path, exact: bool) -> tuple[list[str], float]:
    """(in what a resumed run differs from one that was not killed, largest difference of a weight). A lock that nobody holds is nothing."""
    from safetensors.numpy import load_file

    from prefopt.training.locks import FILE

    listed = [{str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != FILE} for folder in (whole, run)]
    found = [f"{'lacks' if name in listed[0] else 'has left'} {name}" for name in sorted(listed[0] ^ listed[1])]
    largest = 0.0
    for name in sorted(n for n in listed[0] & listed[1] if n.endswith(".safetensors")):
        if exact and (whole / name).read_bytes() != (run / name).read_bytes():
            found.append(f"{name} has other bits")
        left, right = load_file(whole / name), load_file(run / name)
        apart = max((float(abs(left[k].astype(float) - right[k].astype(float)).max()) for k in left if left[k].size), default=0.0)
        if "optimizer" not in name:
            largest = max(largest, apart)
            if apart > TOLERANCE:
                found.append(f"{name} differs by {apart:.2g}")
    for name in sorted(n for n in listed[0] & listed[1] if n.endswith(".jsonl") and n != "checkpoints/log.jsonl"):  # times and sizes
        left, right = rows(whole / name), rows(run / name)
        if exact and left != right:
            wrong = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
            found.append(f"{name}: row {wrong + 1} of {len(left)} is another, there are {len(right)}")
        elif [(r.get("step"), r.get("split")) for r in left] != [(r.get("step"), r.get("split")) for r in right]:
            found.append(f"{name}: rows are lost or doubled ({len(left)} -> {len(right)})")
    if json.loads((run / "status.json").read_text())["state"] != "finished":
        found.append("its status is not finished")
    return found, largest


# ---- all of it --------------------------------------------------------------------------------------------


def undisturbed(case: str, folder: Path, processes: int) -> tuple[float, list[int]]:
    """A run that nobody kills: (its seconds, how many changes of files each process makes)."""

    def inside(rank: int) -> None:
        count = 0

        def seen(event: str, path: str) -> None:
            nonlocal count
            count += 1
            (folder / f"changes-{rank}.txt").write_text(str(count))

        watch(folder, seen)

    group = Group(case, folder, processes, inside)
    codes = group.wait()
    if not codes or any(codes):
        raise SystemExit(f"a run that nobody killed ended with {codes or 'a hang'}; see {folder}/log-*.txt")
    counts = [folder / f"changes-{rank}.txt" for rank in range(processes)]
    return time.monotonic() - group.began, [int(f.read_text()) if f.exists() else 0 for f in counts]


def killed_once(case: str, folder: Path, processes: int, seconds: float, changes: list[int], rng: random.Random) -> dict[str, Any] | None:
    """Starts or resumes the run and kills it; what was done, or None if the run ended before that."""
    kind = rng.choice(("time", "time", "change", "torn"))
    rank = rng.choices(range(processes), weights=changes)[0] if kind != "time" else None
    (folder / "kill.json").unlink(missing_ok=True)
    if rank is None:
        moment = rng.uniform(0.0, seconds)
        group = Group(case, folder, processes)
        codes = group.wait(moment)
        if not codes:
            group.kill()
            return {"kind": kind, "where": f"at {moment:.2f} s"}
    else:
        number = rng.randint(1, changes[rank])
        group = Group(case, folder, processes, strike(folder, rank, number, rng.random() if kind == "torn" else None))
        codes = group.wait()
        if (folder / "kill.json").exists():
            met = json.loads((folder / "kill.json").read_text())
            return {"kind": kind, "rank": rank, "where": where(met["cut"] or met["path"]), **met}
    if not codes or any(codes):
        return {"kind": "failure", "where": f"it ended with {codes or 'a hang'} before it was killed"}
    return None


def torture(processes: int, kills: int, seed: int, root: Path) -> dict[str, Any]:
    rng, began = random.Random(f"{seed} {processes}"), time.monotonic()
    whole = {case: root / f"{case}-{processes}-whole" for case in CASES}
    measured = {case: undisturbed(case, folder, processes) for case, folder in whole.items()}
    done, failures, resumes, largest, number = Counter(), [], 0, 0.0, 0
    met: Counter = Counter()
    while sum(done.values()) < kills:
        number += 1
        case = rng.choice(list(CASES))
        folder = root / f"{case}-{processes}-{number:03d}"
        history = []
        while sum(done.values()) < kills and (not history or rng.random() < 0.4):
            kill = killed_once(case, folder, processes, *measured[case], rng)
            if kill is None:
                break
            history.append(kill)
            done[kill["kind"]] += 1
            met[kill["where"] if kill["kind"] != "time" else "any time"] += 1
        codes = Group(case, folder, processes).wait()
        resumes += bool(history)
        if any(codes) or not codes and not (processes == 2 and finished(folder)):
            wrong = [f"the resume ended with {codes or 'a hang'}"]
        else:
            wrong, apart = differences(whole[case] / "run", folder / "run", exact=processes == 1)
            largest = max(largest, apart)
        if wrong or any(kill["kind"] == "failure" for kill in history):
            failures.append({"run": folder.name, "kills": history, "wrong": wrong})
            print(f"{folder.name}: {'; '.join(wrong)} (after {history})", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(folder)
    return {"processes": processes, "kills": sum(done.values()), "kinds": dict(done), "met": dict(met.most_common()), "resumes": resumes,
            "failures": failures, "largest_difference": largest, "seconds": round(time.monotonic() - began, 1)}


def finished(folder: Path) -> bool:
    from prefopt.training.rundir import read_status

    return read_status(folder / "run").get("state") == "finished"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="kills for each number of processes")
    parser.add_argument("--processes", default="1,2", help="1, 2 or 1,2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/torture"), help="emptied first; runs that differ stay there")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    root = args.folder.resolve()
    shutil.rmtree(root, ignore_errors=True)
    import_all(root / "imports")
    results = [torture(int(n), args.kills, args.seed, root) for n in args.processes.split(",")]
    (root / "summary.json").write_text(json.dumps({"seed": args.seed, "results": results}, indent=2))
    for r in results:
        print(f"{r['processes']} process(es): {r['kills']} kills ({r['kinds']}), {r['resumes']} runs resumed, {len(r['failures'])} differ, "
              f"largest difference of a weight {r['largest_difference']:.2g}, {r['seconds']:.0f} s")
    return int(any(r["failures"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
