"""Learning from sampling trajectories: which model, objective, guidance and settings go together. Imports no torch."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from prefopt.config.objective_source import ObjectiveInfo
from prefopt.config.schema import TrajectoryConfig
from prefopt.errors import UserError

KIND = "trajectories"
OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)  # ${times:KEY,3} in conf/adapter


def check_trajectories(cfg: Any, info: ObjectiveInfo) -> None:
    """Refuses what could not be learned from transitions. Raises `UserError`."""
    source, model, trajectory = cfg.source, cfg.model, cfg.trajectory
    if info.stepwise and source.kind != KIND:
        raise UserError(f"source={source.kind} does not fit: {info.name} learns from the steps of the sampler; use source={KIND}")
    if source.kind != KIND:
        changed = next((key for key, usual in vars(TrajectoryConfig()).items() if getattr(trajectory, key) != usual), None)
        if changed:
            raise UserError(f"trajectory.{changed}={getattr(trajectory, changed)} is for source={KIND}, and source={source.kind} draws no "
                            "trajectories to learn from; leave it out")
        return
    if model.kind != "diffusion":
        raise UserError(f"source={KIND} learns from the steps of a diffusion model's sampler, and model={model.name} has none; choose "
                        "model=tiny-diffusion or model=tiny-flow")
    scored = info.stepwise or info.view == "pairs" and {q for _, wanted in info.quantities.items() for q in wanted} <= {"logp"}
    if not scored or info.coupling == "global" or info.extra or info.mismatched:
        raise UserError(f"source={KIND} gives transitions with their log-probs, and {info.name} reads more than those of a pair; choose "
                        "flow_grpo, ddpo, dpok, d3po, spo_diffusion, gradspo, or a pairwise algorithm such as dpo")
    window, size = trajectory.window, trajectory.window_size
    first, end = window or (0, trajectory.steps)
    if not 0 <= first < end <= trajectory.steps:
        raise UserError(f"trajectory.window=[{first},{end}] is outside the schedule of {trajectory.steps} steps (trajectory.steps); give "
                        f"[first, end] with 0 <= first < end <= {trajectory.steps}")
    if size is not None and size > end - first:
        raise UserError(f"trajectory.window_size={size} is more than the {end - first} steps of the window [{first},{end}]; make it "
                        "smaller, or the window wider")
    pairs = info.view == "pairs"
    if trajectory.candidates and not pairs:
        raise UserError(f"trajectory.candidates={trajectory.candidates} makes pairs at each step, and {info.name} reads no pairs; set "
                        "trajectory.candidates=null, or use algo=spo_diffusion")
    if "grad_scale" in info.fields and not trajectory.candidates:
        raise UserError(f"{info.name} learns from what made the better one of several candidates at a step, and trajectory.candidates=null "
                        "draws none; set trajectory.candidates=4, say")
    if trajectory.candidates and trajectory.window_size:
        raise UserError(f"trajectory.candidates={trajectory.candidates} compares candidates at all steps of trajectory.window; set "
                        "trajectory.window_size=null")
    if trajectory.kind == "cps" and trajectory.noise > 1 or trajectory.candidates and trajectory.outside == "ode":
        raise UserError("trajectory.kind=cps takes trajectory.noise of at most 1, and trajectory.candidates a noisy sampler "
                        "(trajectory.outside=sde)")
    if hasattr(cfg, "sampler"):
        _check_guidance(cfg)


def _check_guidance(cfg: Any) -> None:
    """Sampler, objective and evaluation have one guidance, unless it is declared that they differ."""
    evaluated = cfg.model.guidance if cfg.sampler.guidance is None else cfg.sampler.guidance
    drawn = cfg.model.guidance if cfg.trajectory.guidance is None else cfg.trajectory.guidance
    if (drawn != evaluated) and not cfg.trajectory.guidance_differs:
        raise UserError(f"trajectories are drawn and trained with a guidance of {drawn:g}, and samples are evaluated with {evaluated:g}; "
                        "set trajectory.guidance and sampler.guidance alike, or trajectory.guidance_differs=true if that is meant")
    if cfg.sampler.negative not in (None, "none") and not cfg.trajectory.guidance_differs:
        raise UserError(f"trajectories are drawn and trained with one model, and samples are evaluated with sampler.negative="
                        f"{cfg.sampler.negative}; leave it out, or set trajectory.guidance_differs=true if that is meant")
