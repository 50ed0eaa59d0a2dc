"""Settings of rounds and of a reference that moves: which go together. Imports no torch."""

from __future__ import annotations

from typing import Any

from prefopt.config.catalogue import VIEWS
from prefopt.config.objective_source import ObjectiveInfo
from prefopt.errors import UserError

ROUNDS_ONLY = {"writer": "policy", "keep": None, "labels": "best", "extrapolate": 0.0}  # and what they are elsewhere


def check_rounds(cfg: Any, info: ObjectiveInfo) -> None:
    """Refuses settings of rounds that would do nothing, or that the objective cannot use."""
    source = cfg.source
    if source.kind != "rounds":
        for key, usual in ROUNDS_ONLY.items():
            if (value := getattr(source, key)) != usual:
                raise UserError(f"source.{key}={value} is for pairs made of rounds; leave it out, or use source=rounds")
        return
    if source.keep and source.keep >= source.samples:
        many = f"source.keep={source.keep}: rejection sampling needs more samples than it keeps, not source.samples={source.samples}"
        raise UserError(f"{many}; raise it (64 for 8 kept is usual), or set source.keep=null")
    if source.labels == "soft":
        if info.view not in ("pairs", "unary"):
            raise UserError(f"source.labels=soft labels pairs, and {info.name} reads {VIEWS[info.view]}; use source.labels=best")
        if cfg.data.pairs == "all" and (source.keep or source.samples) > 2:
            raise UserError("source.labels=soft labels one pair of a prompt's replies, and data.pairs=all makes several; use "
                            "data.pairs=best_worst")
    if source.writer == "reference" and not info.needs_reference:
        raise UserError(f"source.writer=reference: {info.name} reads no reference that could write the replies; use source.writer=policy")


def check_refresh(cfg: Any) -> None:
    """Refuses a moving reference that could not move."""
    refresh, offline = cfg.reference.refresh, cfg.source.kind == "offline"
    if refresh == "never":
        for key, usual in (("mix", 1.0), ("every", 512)):
            if (value := getattr(cfg.reference, key)) != usual:
                raise UserError(f"reference.{key}={value} says how the reference moves, and with reference.refresh=never it stays where it "
                                "is; let it move (reference.refresh=steps, or reference=ema, sync, round, stage), or leave it out")
        return
    if cfg.reference.policy == "base":
        raise UserError(f"reference.refresh={refresh} moves the reference to the policy; set reference.policy=initial")
    if refresh == "round" and offline:
        raise UserError("reference.refresh=round needs rounds, and source=offline has none; use source=rounds, or reference=default, which "
                        "stays where it is")
    if refresh == "stage":
        if not offline:
            raise UserError(f"reference.refresh=stage needs given rows in stages, and source={cfg.source.kind} samples its rows; use "
                            "reference.refresh=round")
        kinds = [(settings or {}).get("kind", name) for name, settings in cfg.data.transforms.items()]
        if "curriculum" not in kinds:
            raise UserError("reference.refresh=stage moves the reference at each stage of the data, and no transform makes stages; add "
                            "transforms=curriculum, or use reference=default, which stays where it is")
