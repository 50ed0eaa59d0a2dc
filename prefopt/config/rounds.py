"""Settings of rounds and of a reference that moves: which go together. Imports no torch."""

from __future__ import annotations

from typing import Any

from prefopt.config.catalogue import VIEWS
from prefopt.config.objective_source import ObjectiveInfo
from prefopt.config.schema import PICTURE_REWARDS
from prefopt.errors import UserError, nearest

PICTURES_ONLY = {"partner": "sample", "judge": "reward", "mix": 1.0, "top": 1.0, "guidance": None}  # and what they are elsewhere
ROUNDS_ONLY = {"writer": "policy", "keep": None, "labels": "best", "extrapolate": 0.0, **PICTURES_ONLY}


JUDGES = {  # what to do where there is none, by whether completions are pictures
    False: "Train one with algo=reward_bt and set reward=model reward.path=RUN.",
    True: "Choose one for pictures: reward=pickscore reward.path=FOLDER, say (prefopt list reward).",
}
HELD_OUT = "held_out/"  # what measures of samples by rewards that nothing is trained on are called
ALONE = "it must be at least 2: one reply alone is neither better nor worse than anything"


def check_rounds(cfg: Any, info: ObjectiveInfo) -> None:
    """Refuses settings of rounds that would do nothing, or that the objective cannot use."""
    source = cfg.source
    if source.kind != "rounds":
        if getattr(cfg, "noise", None) and cfg.noise.plan == "states":
            raise UserError(f"noise.plan=states scores samples at the states that they were drawn through, and source={source.kind} has "
                            "none; use source=rounds, or another noise")
        for key, usual in ROUNDS_ONLY.items():
            if (value := getattr(source, key)) != usual:
                raise UserError(f"source.{key}={value} is for pairs made of rounds; leave it out, or use source=rounds")
        compared = source.kind == "trajectories" and cfg.trajectory.candidates  # at each step with one another
        if source.kind in ("rollout", "trajectories") and source.samples < 2 and not compared:
            raise UserError(f"source.samples={source.samples}: {ALONE}; set source.samples=8, say")
        return
    check_picture_rounds(cfg, info)
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


def check_picture_rounds(cfg: Any, info: ObjectiveInfo) -> None:
    """The same of what only rounds of pictures have, and of what these cannot have."""
    source = cfg.source
    imitates = info.view == "demonstrations" and cfg.model.kind == "diffusion"  # also where the best prompts alone are kept
    if source.samples < 2 and source.partner == "sample" and not imitates:
        raise UserError(f"source.samples={source.samples}: {ALONE}; raise it, or with pictures let it meet the one that its row holds "
                        "(source.partner=given)")
    if cfg.model.kind != "diffusion":
        for key, usual in PICTURES_ONLY.items():
            if (value := getattr(source, key)) != usual:
                raise UserError(f"source.{key}={value} is for rounds of pictures, and model={cfg.model.name} writes texts; leave it out")
    if (source.labels == "given") > (source.partner == "given"):
        raise UserError("source.labels=given prefers the picture that a row holds, and source.partner=sample leaves it out; set "
                        "source.partner=given, or another source.labels")
    if cfg.model.kind != "diffusion":
        return
    if cfg.data.buckets:
        raise UserError(f"data.buckets={cfg.data.buckets}: rounds draw pictures of one shape; set data.buckets=null")
    if source.partner == "given" and (source.samples > 1 or source.keep or info.view not in ("pairs", "unary")):
        raise UserError("source.partner=given makes a pair of the picture that a row holds and one sample; it goes with source.samples=1, "
                        "source.keep=null and an algorithm that learns from pairs")
    if source.judge == "policy" and (source.partner == "given" or not info.needs_reference):
        raise UserError("source.judge=policy ranks a prompt's samples by how much likelier the policy finds them than at the start; it "
                        "goes with source.partner=sample and an algorithm with a reference")
    if source.mix < 1 and (source.keep or info.view != "pairs"):
        raise UserError(f"source.mix={source.mix:g} mixes samples with pairs of the data; it goes with source.keep=null and an algorithm "
                        "that learns from pairs")
    if source.top < 1 and info.view != "demonstrations":
        raise UserError(f"source.top={source.top:g} keeps the best samples to imitate, and {info.name} reads {VIEWS[info.view]}; set "
                        "source.top=1, or use algo=sft")
    if hasattr(cfg, "noise") and cfg.noise.plan == "states" and (source.partner, source.guidance) != ("given", 1):
        raise UserError("noise.plan=states scores a sample at the states that it was drawn through, as it was predicted there, beside the "
                        "picture that its row holds; that needs source.partner=given and source.guidance=1: use source=self_play_states")


def held_out_reward(said: str) -> tuple[str, str | None]:
    """(kind, path) of an entry of `evaluation.rewards`."""
    kind, _, path = said.partition(":")
    return kind, path or None


def check_picture_rewards(cfg: Any) -> None:
    """Refuses settings of RPO's reward where another one is chosen, and held-out rewards that are none."""
    check_harmonic(cfg.reward)
    asked = cfg.evaluation.rewards if hasattr(cfg, "evaluation") else []
    known = [kind for kind in PICTURE_REWARDS if kind != "harmonic"]  # whose photos are those of the reward that is trained on
    for number, said in enumerate(asked):
        kind, path = held_out_reward(said)
        if kind not in known:
            raise UserError(f"evaluation.rewards: {kind} is none of the rewards of pictures that need no settings "
                            f"({', '.join(known)}){nearest(kind, known)}")
        if (path is None) != (kind == "brisque"):
            what = "has its weights with it, and takes no path" if path else "needs the folder or hub id of its model"
            raise UserError(f"evaluation.rewards: {said}: {kind} {what}; write {kind if path else f'{kind}:FOLDER_OR_HUB_ID'}")
        if kind == cfg.reward.kind or kind in (held_out_reward(other)[0] for other in asked[:number]):
            raise UserError(f"evaluation.rewards: {kind} is there already{' as reward=' + kind if kind == cfg.reward.kind else ''}; leave "
                            "it out")
    if asked and not cfg.data.pictures:
        raise UserError(f"evaluation.rewards={asked} judge pictures, and data={cfg.data.name} holds texts; leave it out")
    if asked and not cfg.evaluation.prompts:
        raise UserError(f"evaluation.rewards={asked} judge samples, and evaluation.prompts=0 asks for none; raise it, or leave them out")


def check_harmonic(reward: Any) -> None:
    """Refuses settings of RPO's reward where another one is chosen."""
    for key, usual in (("photos", None), ("likeness", 0.0)):
        if reward.kind != "harmonic" and (value := getattr(reward, key)) != usual:
            raise UserError(f"reward.{key}={value} is read with reward=harmonic only; add that, or leave it out")


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
    if refresh in ("round", "past") and offline:
        raise UserError(f"reference.refresh={refresh} needs rounds, and source=offline has none; use source=rounds, or "
                        "reference=default, which stays where it is")
    if refresh == "stage":
        if not offline:
            raise UserError(f"reference.refresh=stage needs given rows in stages, and source={cfg.source.kind} samples its rows; use "
                            "reference.refresh=round")
        kinds = [(settings or {}).get("kind", name) for name, settings in cfg.data.transforms.items()]
        if "curriculum" not in kinds:
            raise UserError("reference.refresh=stage moves the reference at each stage of the data, and no transform makes stages; add "
                            "transforms=curriculum, or use reference=default, which stays where it is")
