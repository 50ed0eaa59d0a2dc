"""`prefopt label`: the rows of a dataset with a reward model's judgement, as a file that data=jsonl reads."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.config.schema import ColumnsConfig, LabelConfig
from prefopt.data.records import Completion, Example
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from prefopt.rewards.true_reward import make_rewards
from prefopt.training.rundir import write_atomic
from prefopt.training.setup import make_accelerator

OURS = {"reward", "reward_chosen", "reward_rejected"}  # columns that say what the replies were worth
CHUNK = 1024  # rows scored at a time


@dataclass
class Counts:
    """What became of the rows. `compared` counts pairs of replies of which the data preferred one."""

    rows: int = 0
    compared: int = 0
    disagreements: int = 0
    ties: int = 0
    margins_left_out: int = 0
    rankings_left_out: int = 0


def label(cfg: LabelConfig) -> dict[str, Any]:
    """Writes `cfg.output`; returns the counts. Raises `UserError` if the file is there already, or nothing can be scored."""
    output = Path(cfg.output).expanduser()
    if output.exists():
        raise UserError(f"output={cfg.output} is there already; choose another name, or remove it")
    if output.suffix != ".jsonl":
        raise UserError(f"output={cfg.output}: the rows are written as JSON lines; choose a name that ends in .jsonl")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output={cfg.output}: there is no folder {output.parent}; make it first")
    if cfg.hardware.processes > 1:
        raise UserError(f"hardware.processes={cfg.hardware.processes}: prefopt label runs in one process; set hardware.processes=1")
    splits = {split.name: split for split in load_data(replace(cfg.data, eval_fraction=0.0), cfg.trust, unscored=True)}
    examples, rejected = splits[cfg.split].examples, splits[cfg.split].rejected
    if not examples:
        raise UserError(f"data={cfg.data.name} has no {cfg.split} rows of its own; use split=train")
    rewards = make_rewards(cfg.reward, cfg.data, cfg.trust, make_accelerator(cfg).device, cfg.hardware.precision)
    reward = rewards.get("reward") or rewards.get("true_reward")
    if reward is None:
        raise UserError(f"reward={cfg.reward.kind} gives no reward for data={cfg.data.name}; set reward=model reward.path=RUN")
    counts, lines = Counts(), []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        if bare := next((e for e in chunk if not e.completions), None):
            raise UserError(f"{bare.origin}: the row is a prompt alone, and there is no reply to score")
        scores = iter(reward([replace(e, completions=[c], kind="demonstration") for e in chunk for c in e.completions]))
        for example in chunk:
            own = list(itertools.islice(scores, len(example.completions)))
            row = labelled(example, own, cfg.labels == "soft", counts, output.absolute().parent)
            if row is not None:
                lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    if not lines:
        raise UserError("no row could be labelled: all replies to each prompt have the same reward")
    write_atomic(output, "".join(lines))
    print("\n".join(report(counts, len(rejected), cfg.output)))
    return {**asdict(counts), "rejected": len(rejected)}


def labelled(example: Example, rewards: list[float], soft: bool, counts: Counts, folder: Path = Path()) -> dict[str, Any] | None:
    """The row, for a file in `folder`, of an example whose completions have these `rewards`, better ones first; None for a ranking that
    says nothing.

    A pair gets `label` = sigmoid(r_chosen - r_rejected) if `soft`. Pairs that tie stay as they are.
    """
    if bad := next((r for r in rewards if not math.isfinite(r)), None):
        raise UserError(f"{example.origin}: the reward of a completion is {bad}; a reward must be a finite number")
    taken = {*asdict(ColumnsConfig()).values(), *OURS} - {"user"}  # which says nothing of texts, and stays
    row: dict[str, Any] = {"prompt": example.prompt_text if not example.chat else [m.plain() for m in example.prompt]}
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    replies = [content(example.completions[i], example.chat, folder) for i in order]
    ranked = [rewards[i] for i in order]
    if example.kind == "pair":
        _compare(counts, rewards[0] - rewards[1], example.label - 0.5)
        row |= {"chosen": replies[0], "rejected": replies[1]}
        if soft:
            row["label"] = 1 / (1 + math.exp(ranked[1] - ranked[0]))
        row |= {"reward_chosen": ranked[0], "reward_rejected": ranked[1]}
        counts.margins_left_out += bool(example.margin)  # it said by how much the given preference was to win
    elif example.kind == "ranking":
        given = [completion.score for completion in example.completions]
        for a, b in itertools.combinations(range(len(rewards)) if None not in given else (), 2):
            _compare(counts, rewards[a] - rewards[b], given[a] - given[b])
        if ranked[0] == ranked[-1]:
            counts.rankings_left_out += 1
            return None
        row |= {"completions": replies, "scores": ranked}
    else:
        row |= {"completion": replies[0], "reward": ranked[0]}
        if example.kind == "unary":
            row["label"] = bool(example.completions[0].desirable)
    if example.weight != 1:
        row["weight"] = example.weight
    if (user := next((m.user for m in example.prompt if m.user is not None), None)) is not None:
        row["user"] = user
    counts.rows += 1
    return row | {key: value for key, value in example.meta.items() if key not in taken}


def content(completion: Completion, chat: bool, folder: Path) -> Any:
    """A completion as the row held it: bare text, messages, or where its picture is (relative to `folder`, if it lies there)."""
    if part := completion.picture:
        if "path" not in part:
            raise UserError("a picture of these rows is in no file that a row could name; write them with their pictures to files first")
        path = Path(part["path"]).absolute()
        where = {**part, "path": str(path.relative_to(folder) if path.is_relative_to(folder) and "column" not in part else path)}
        ops = where.pop("ops", None)
        del where["type"]
        own = {"caption": completion.text} if completion.text else {}
        return {"image": where if len(where) > 1 else where["path"], **own, **({"ops": ops} if ops else {})}
    single = len(completion.messages) == 1
    return completion.text if single and not chat else [m.plain() for m in completion.messages]


def _compare(counts: Counts, ours: float, theirs: float) -> None:
    """Two replies of which we say that the first is better by `ours`, and the data by `theirs`."""
    if theirs != 0:
        counts.compared += 1
        counts.disagreements += ours * theirs < 0
        counts.ties += ours == 0


def report(counts: Counts, rejected: int, output: str) -> list[str]:
    """What is said at the end."""
    lines = [f"{counts.rows} rows written to {output}"]
    if counts.compared:
        share = 100 * counts.disagreements / counts.compared
        lines.append(f"the reward disagrees with the given preference in {counts.disagreements} of {counts.compared} pairs of replies "
                     f"({share:.1f} %); {counts.ties} ties")
    if rejected:
        lines.append(f"{rejected} bad rows left out (data.on_bad_row=skip)")
    if counts.rankings_left_out:
        lines.append(f"{counts.rankings_left_out} rankings left out: all their replies have the same reward")
    if counts.margins_left_out:
        lines.append(f"the margins of {counts.margins_left_out} rows left out: they were those of the given preference")
    return lines
