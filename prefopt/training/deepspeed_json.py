"""DeepSpeed's JSON for a run: generated from `hardware`, and what a user's own file (`hardware.deepspeed`) puts over it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError, nearest

# Sections that a run may change. DeepSpeed reads past a key that it does not know.
FREE = (
    "activation_checkpointing", "aio", "comms_logger", "communication_data_type", "csv_monitor", "data_types", "dump_state",
    "flops_profiler", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "steps_per_print", "torch_autocast",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)
# Keys that say what a run's own keys say -> those, for the message.
OURS = {
    "optimizer": "optim", "scheduler": "optim.schedule", "fp16": "hardware.precision", "bf16": "hardware.precision",
    "bfloat16": "hardware.precision", "amp": "hardware.precision", "tensorboard": "tracker.tensorboard", "wandb": "tracker",
    "data_efficiency": "data", "curriculum_learning": "transforms",
}
# Weights that are neither in memory nor what they stand for cannot be gathered outside of DeepSpeed's own passes.
ELSEWHERE = {
    "zero_optimization.zero_quantized_weights": (True,), "zero_optimization.zero_quantized_nontrainable_weights": (True,),
    "zero_optimization.offload_param.device": ("nvme",),
}


def deepspeed_json(cfg: TrainConfig) -> dict[str, Any] | None:
    """What DeepSpeed is told; None for a run without it. Raises `UserError` for a file that cannot be read or contradicts the run.

    A micro-batch is a forward pass here, whatever rows it holds, and the run decides when gradients are exchanged; so the batch sizes of
    DeepSpeed are all 1 and mean nothing.
    """
    hardware = cfg.hardware
    if not hardware.zero:
        if hardware.deepspeed:
            raise UserError(f"hardware.deepspeed={hardware.deepspeed} is for ZeRO; set hardware.zero to 1, 2 or 3 as well")
        return None
    gpu = hardware.device != "cpu"
    zero: dict[str, Any] = {"stage": hardware.zero, "overlap_comm": gpu and hardware.offload == "none", "contiguous_gradients": True}
    # Buckets of 200 MB in fp32: large enough for the network, small beside the weights.
    zero |= {"reduce_bucket_size": 50_000_000}
    if hardware.zero < 3:
        zero |= {"allgather_bucket_size": 50_000_000}
    else:
        zero |= {"stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000,
                 "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000}
    if hardware.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if hardware.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    made = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": cfg.optim.max_grad_norm,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000, "wall_clock_breakdown": False,
    }
    return merged(made, _read(hardware.deepspeed), hardware.deepspeed) if hardware.deepspeed else made


def check_zero(cfg: TrainConfig) -> None:
    """Whether this machine can run what DeepSpeed is asked for. Raises `UserError`."""
    if deepspeed_json(cfg) and find_spec("deepspeed") is None:
        raise UserError(f"hardware.zero={cfg.hardware.zero} needs the package deepspeed, which is not installed here; "
                        'pip install "prefopt[deepspeed]", or set hardware.zero=0')


def merged(made: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    """The generated settings with a user's over them; "auto" leaves the generated one. Raises `UserError` where both speak of the run."""
    out = dict(made)
    for key, value in theirs.items():
        name = prefix + key
        if value == "auto":
            continue
        if not prefix and key in OURS:
            if isinstance(value, dict) and value.get("enabled") is False:
                continue
            raise UserError(f"{path}: {key} is set by {OURS[key]} in prefopt; remove it from the file")
        if key == "train_batch_size" and not prefix:
            raise UserError(f"{path}: train_batch_size is train.batch_size in prefopt, over all processes; remove it from the file")
        fixed = name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "zero_optimization.stage")
        if fixed and value != made[key]:
            ours = {"gradient_clipping": "optim.max_grad_norm", "zero_optimization.stage": "hardware.zero"}.get(name)
            fix = f"set {ours}={value}, or remove it" if ours else "prefopt splits a step by train.micro_batch_tokens; remove it"
            raise UserError(f"{path}: {name} is {value} and this run has {made[key]}; {fix}")
        if value in ELSEWHERE.get(name, ()):
            raise UserError(f"{path}: {name} is {json.dumps(value)}, and a run samples and saves with the weights as they are; remove it")
        if name in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param") and key not in made:
            if isinstance(value, dict) and value.get("device") in (None, "none"):
                continue
            wanted = "all" if key == "offload_param" else "optimizer"
            raise UserError(f"{path}: {name} moves state to {value.get('device') if isinstance(value, dict) else value}; "
                            f"set hardware.offload={wanted}, or remove it")
        if not prefix and key not in made and key not in FREE:
            raise UserError(f"{path}: unknown key {key}{nearest(key, [*made, *FREE])}")
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            value = merged(made[key], value, path, f"{name}.")
        out[key] = value
    return out


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"hardware.deepspeed={path} cannot be read ({error}); give a JSON file of DeepSpeed's settings") from error
    if not isinstance(found, dict):
        raise UserError(f"hardware.deepspeed={path} holds no JSON object; give a JSON file of DeepSpeed's settings")
    return found
