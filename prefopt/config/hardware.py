"""Whether a run can be divided among processes as its hardware config says."""

from __future__ import annotations

from typing import Any

from prefopt.config.objective_source import ObjectiveInfo
from prefopt.errors import UserError


def check_hardware(cfg: Any, info: ObjectiveInfo) -> None:
    """Raises `UserError` for what DeepSpeed, or ZeRO stage 3, cannot do."""
    hardware, model = cfg.hardware, cfg.model
    if hardware.device == "mps" and (hardware.processes > 1 or hardware.zero):
        raise UserError("hardware.device=mps is one GPU, for one process without ZeRO; set hardware.processes=1 hardware.zero=0")
    if hardware.device == "mps" and hardware.precision == "bf16":
        raise UserError("hardware.device=mps computes in fp32 here; set hardware.precision=fp32")
    if not hardware.zero:
        for key in ("offload", "deepspeed"):
            if getattr(hardware, key) not in ("none", None):
                raise UserError(f"hardware.{key}={getattr(hardware, key)} is for ZeRO; set hardware.zero to 1, 2 or 3 as well")
        return
    if hardware.offload == "all" and hardware.zero < 3:
        raise UserError(f"hardware.offload=all moves weights, which only stage 3 splits, and hardware.zero={hardware.zero}; "
                        "set hardware.offload=optimizer, or hardware.zero=3")
    if model.kind == "tabular":
        raise UserError(f"model={model.name} is a small table, and there is nothing to split; set hardware.zero=0")
    if hardware.zero < 3:
        return
    # Each of these reads or writes whole weights between steps, which under stage 3 no process has.
    whole = {
        f"reference.refresh={cfg.reference.refresh}": cfg.reference.refresh != "never",
        f"train.ema={cfg.train.ema}": cfg.train.ema is not None,
        f"source.extrapolate={cfg.source.extrapolate:g}": bool(cfg.source.extrapolate),
        f"{info.name}, which follows averages of the weights,": "slow" in info.quantities or "ema_decay" in info.fields,
        f"model.quantize={model.quantize}": bool(model.quantize),
    }
    for what, asked in whole.items():
        if asked:
            raise UserError(f"{what} needs whole weights on every process, and hardware.zero=3 splits them; set hardware.zero=2")
