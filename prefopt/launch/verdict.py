"""Why a run on several processes ended, in one sentence: the first cause, not what the other processes saw of it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.report.run_report import write_report
from prefopt.tracking.redact import redact
from prefopt.training.locks import BUSY
from prefopt.training.ranks import log_path, read_records
from prefopt.training.rundir import read_status, write_atomic

ENDED = ("finished", "stopped", "failed")


def verdict(folder: Path, world: int, exits: Mapping[int, int], timeout: float, patience: float = 5.0) -> tuple[str, int]:
    """(sentence, exit code) of a failed run of `world` processes. `exits`: exit codes by rank; negative ones are signals, as in
    `subprocess`, and 0 stands for a process that was ended because of others. `patience`: seconds to wait for more records."""
    deadline = time.monotonic() + patience  # the others see that one is gone, and write so, a little later
    while True:
        records = {r["rank"]: r for r in read_records(folder)}
        failed = [r for r in records.values() if r["state"] == "failed"]
        own = [r for r in failed if r["kind"] == "error"]
        killed = sorted(rank for rank, code in exits.items() if code < 0 and records.get(rank, {}).get("state") not in ENDED)
        if own or killed or len(failed) >= world or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    aborted = [rank for rank in killed if exits[rank] == -signal.SIGABRT and _nccl_timeout(folder, rank)]
    if own:
        first = min(own, key=lambda r: r["time"])
        return _said(folder, records, [r for r in own if r["message"] == first["message"]]), first["code"]
    waited = {r["rank"] for r in failed if r["kind"] == "timeout"} | set(aborted)
    if waited:
        return _did_not_come(folder, records, waited, world, timeout), 1
    if killed:
        rank = killed[0]
        name = signal.Signals(-exits[rank]).name
        memory = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"{_who(records, rank)} was ended by {name}{memory}; its log: {log_path(folder, rank)}. {_go_on(folder)}", 1
    silent = [rank for rank in range(world) if records.get(rank, {}).get("state") not in ENDED]
    if failed and silent:
        return (f"{_names(records, silent)} {'was' if len(silent) == 1 else 'were'} lost: {_last_seen(folder, records, silent)}. "
                f"{_go_on(folder)} It may be on fewer machines: set hardware.nodes and hardware.processes."), 1
    if failed:
        first = min(failed, key=lambda r: r["time"])
        return f"{_said(folder, records, [first])}. {_go_on(folder)}", 1
    code = next((code for code in exits.values() if code), 1)
    return f"a worker process ended with exit code {code}; logs: {log_path(folder, 0).parent}", code


def spoken(folder: Path, rank: int, world: int, timeout: float) -> str:
    """What this rank has to say of a failed run that nobody watches: the sentence on one of those that failed, nothing on the others."""
    time.sleep(0.5)  # processes that fail for one reason do so at about the same time
    sentence, _ = verdict(folder, world, {}, timeout)
    failed = [r for r in read_records(folder) if r["state"] == "failed"]
    own = [r for r in failed if r["kind"] == "error"]
    cause = min(own, key=lambda r: r["time"])["message"] if own else None
    speaks = min(r["rank"] for r in failed if cause is None or r["message"] == cause)
    return sentence if rank == speaks else ""


def conclude(folder: Path, sentence: str) -> None:
    """Puts the cause into status and report. Rank 0 wrote there what it saw, or nothing where it was killed."""
    status = read_status(folder)
    if status.get("state") in ("running", "failed") and BUSY not in sentence:  # else it is the run of others, and goes on
        write_atomic(folder / "status.json", json.dumps({**status, "state": "failed", "message": redact(sentence)}, indent=2))
        if (folder / "metrics.jsonl").exists():
            write_report(folder)


def _said(folder: Path, records: Mapping[int, Any], same: list[dict[str, Any]]) -> str:
    """The message of a rank. What rank 0 says as well is about the run and needs no name."""
    first = min(same, key=lambda r: r["rank"])
    if first["rank"] == 0 and not first.get("traceback"):
        return first["message"]
    kept = "traceback in" if first.get("traceback") else "its log:"
    return f"{_who(records, first['rank'])}: {first['message'].rstrip('.')} ({kept} {log_path(folder, first['rank'])})"


def _did_not_come(folder: Path, records: Mapping[int, Any], waited: set[int], world: int, timeout: float) -> str:
    late = [rank for rank in range(world) if rank not in waited and records.get(rank, {}).get("state") != "failed"]
    if not late:  # all of them waited, for a network or a device; a step that is behind is the best hint
        steps = {rank: r["step"] for rank, r in records.items()}
        late = [rank for rank, step in steps.items() if step < max(steps.values())]
    if not late:
        return (f"all processes waited for the others for {timeout:g} s (hardware.timeout): a link or a device hangs; logs: "
                f"{log_path(folder, 0).parent}. {_go_on(folder)}")
    return (f"{_names(records, late)} did not arrive within {timeout:g} s (hardware.timeout): {_last_seen(folder, records, late)}. "
            f"{_go_on(folder)}")


def _last_seen(folder: Path, records: Mapping[int, Any], ranks: list[int]) -> str:
    rank = ranks[0]
    if rank not in records:
        return f"it never began; its log: {log_path(folder, rank)}"
    record = records[rank]
    newest = max(r["time"] for r in records.values())
    ago = max(0.0, newest - record["time"])
    at = f" in {record['where']}" if record.get("where") else ""
    which = f"rank {rank} " if len(ranks) > 1 else ""
    return f"{which}last seen after step {record['step']}{at}, {ago:.0f} s before the end; its log: {log_path(folder, rank)}"


def _names(records: Mapping[int, Any], ranks: list[int]) -> str:
    shown = ", ".join(_who(records, rank) for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _who(records: Mapping[int, Any], rank: int) -> str:
    hosts = {r["host"] for r in records.values()}
    return f"rank {rank}" + (f" on {records[rank]['host']}" if len(hosts) > 1 and rank in records else "")


def _go_on(folder: Path) -> str:
    goes_on = "goes on from the last checkpoint" if any((folder / "checkpoints").glob("step-*")) else "begins again: there is no checkpoint"
    return f"The same command with hydra.run.dir={folder} {goes_on}."


def _nccl_timeout(folder: Path, rank: int) -> bool:
    """Whether NCCL's watchdog ended a process, which then writes no record of its own."""
    try:
        with open(log_path(folder, rank), "rb") as log:
            log.seek(max(0, log.seek(0, 2) - (1 << 18)))
            return b"collective operation timeout" in log.read()
    except OSError:
        return False
