"""What a worker process runs: the training loop on the config in its environment. `python -m prefopt.launch.worker`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.launch.group import CONFIG_ENV, same_folder
from prefopt.training.ranks import Member, kind_of, member


def main() -> int:
    from prefopt.cli import guarded
    from prefopt.training.loop import train

    die_with_parent()
    cfg = config_from(json.loads(os.environ[CONFIG_ENV]))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return guarded(lambda: train(cfg))
    code, stopped = run_rank(cfg)
    return 0 if stopped else code  # torch elastic would take another code for a failure, and end the others before they are done


def config_from(plain: dict[str, Any]) -> TrainConfig:
    """The config that another process has composed and checked."""
    from omegaconf import OmegaConf

    from prefopt.config.filled import filled

    return OmegaConf.to_object(filled(TrainConfig, plain))


def run_rank(cfg: TrainConfig) -> tuple[int, bool]:
    """(exit code, whether the run was stopped by a signal) of this process's part of a run. Its errors are in its log and its record."""
    from prefopt.training.loop import train

    rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(cfg.run_dir)
    with member(folder, rank, world, cfg.hardware.timeout) as me:
        def work() -> dict[str, Any]:
            same_folder(folder, rank)
            _check_devices(cfg, int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", world)))
            result = train(cfg) or {}
            _leave_together()
            return result

        return _recorded(me, work)


def _recorded(me: Member, work: Callable[[], dict[str, Any]]) -> tuple[int, bool]:
    from prefopt.cli import guarded

    result: dict[str, Any] = {}
    said, kind = [], ["error"]

    def run() -> dict[str, Any]:
        try:
            result.update(work())
        except Exception as error:
            kind[0] = kind_of(error)
            raise
        return result

    def say(message: str, code: int) -> None:
        me.hush()  # whoever started the processes says the first cause, once
        print(f"prefopt: {message}", file=sys.stderr)
        said.append(message)

    try:
        code = guarded(run, say)
    except Exception as error:
        me.hush()
        traceback.print_exc()
        me.end("failed", 1, f"{type(error).__name__}: {error}", kind[0], traceback=True)
        return 1, False
    state = "finished" if code == 0 else "stopped" if code in (130, 143) else "failed"
    me.end(state, code, said[-1] if said else "", kind[0] if state == "failed" else "")
    return code, "stopped" in result


def _leave_together() -> None:
    """No process leaves while another still writes: whoever started them takes the first that ends for the end of all."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def _check_devices(cfg: TrainConfig, local_rank: int, local_world: int) -> None:
    import torch

    if cfg.hardware.device in ("auto", "cuda") and torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise UserError(f"this machine shows {torch.cuda.device_count()} GPUs and {local_world} processes were started on it, one for "
                        "each; set hardware.processes, or CUDA_VISIBLE_DEVICES")


def die_with_parent() -> None:
    """Has the kernel send this process SIGTERM when the one that started it is gone: nothing goes on unseen after a kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
