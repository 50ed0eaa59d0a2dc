"""Examples -> rows that an objective can be trained on: tokenised, checked against what the objective reads, counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.config.schema import DataConfig
from prefopt.data.batch import Row, derangement
from prefopt.data.extra import sequences
from prefopt.data.fits import check_use
from prefopt.data.records import BadRow, Example
from prefopt.data.sources import Split, reject
from prefopt.data.tokenise import Tokens
from prefopt.errors import UserError


@dataclass
class Dataset:
    """Rows ready to be batched, beside the examples they came from (same order)."""

    rows: list[Row]
    examples: list[Example]
    stats: dict[str, Any] = field(default_factory=dict)


def make_dataset(
    split: Split, cfg: DataConfig, tokenise: Callable[[Example], Tokens], view: str, columns: tuple[str, ...],
    mismatched: bool, seed: int, progress: Callable[[list], Any] = iter, extra: Sequence[str] = (),
) -> Dataset:
    """Tokenises a split for an objective with this `view` that reads these optional `columns` and scores these `extra` sequences.

    Raises `UserError` where the objective cannot use the data, and for bad rows as `data.on_bad_row` says.
    """
    out = Dataset([], [])
    truncated_prompts = truncated_completions = cut_tokens = undesirable = 0
    for example in progress(split.examples):
        check_use(example, cfg, view, columns)
        if view == "demonstrations" and example.completions[0].desirable is False:
            undesirable += 1  # thumbs-down rows are no demonstrations; the count is reported
            continue
        example = reduce_ranking(example, "all" if view == "ranking" else cfg.pairs)
        try:
            tokens = tokenise(example)
            row = _row(example, tokens)
            row.extra = sequences(example, tokens, row.pairs(), extra, tokenise) if extra else []
        except BadRow as reason:
            reject(split, example.origin, str(reason), cfg)
            continue
        truncated_prompts += tokens.cut_prompt > 0
        truncated_completions += sum(c > 0 for c in tokens.cut_completions)
        cut_tokens += tokens.cut_prompt + sum(tokens.cut_completions)
        out.examples.append(example)
        out.rows.append(row)
    alone = _add_mismatched(out, split.name, seed, tokenise) if mismatched else 0
    if any(c.logp is not None for e in out.examples for c in e.completions):
        _add_writer(out)
    replies = sum(len(r.tokens.branches) for r in out.rows)
    out.stats = {
        "rows": len(out.rows), "rejected": len(split.rejected), "no_preference": split.no_preference.total(), "completions": replies,
        "truncated_prompts": truncated_prompts, "truncated_completions": truncated_completions, "cut_tokens": cut_tokens,
        "undesirable_left_out": undesirable, **({"rows_without_mismatched_reply": alone} if alone else {}),
        "longest": max((tokens.longest for r in out.rows for tokens in (r.tokens, *r.extra)), default=0),
        "trained_tokens": sum(b.trained for r in out.rows for b in r.branches(view)),
    }
    if extra:
        out.stats |= _about_extra(out.rows)
    if split.transforms:
        out.stats["transforms"] = split.transforms
    return out


def _row(example: Example, tokens: Tokens) -> Row:
    if any(tokens.cut_completions) and any(c.logp is not None for c in example.completions):
        raise BadRow("a reply is cut (data.max_completion_tokens), and its log-prob under the policy that wrote it speaks of all of it")
    kind = "ranking_all" if example.kind == "ranking" and len(example.completions) > 2 else example.kind
    desirable = [c.desirable for c in example.completions]
    return Row(tokens, kind, example.label, example.weight, example.margin, [c.score for c in example.completions],
               desirable if None not in desirable else None, stage=example.stage)


def _add_writer(data: Dataset) -> None:
    """Stores what the policy that wrote the replies gave them; not a number for those of which the data does not say it."""
    for row, example in zip(data.rows, data.examples, strict=True):
        known = [math.nan if c.logp is None else c.logp for c in example.completions]
        row.stored["writer"] = known + [math.nan] * (len(row.everything()) - len(known))


def _about_extra(rows: list[Row]) -> dict[str, Any]:
    """How many extra sequences there are, how many of them were cut, and a digest of their ids (of templates and texts, that is)."""
    h = hashlib.sha256()
    made = [tokens for row in rows for tokens in row.extra]
    for tokens in made:
        h.update(repr((tokens.prompt, tokens.branches[0].ids, tokens.branches[0].mask)).encode())
    cut = sum(tokens.cut_prompt > 0 or any(tokens.cut_completions) for tokens in made)
    return {"extra_sequences": len(made), "truncated_extra_sequences": cut, "extra_sha256": h.hexdigest()}


def make_prompts(split: Split, cfg: DataConfig, prompt_ids: Callable[[list, bool], list[int]]) -> Dataset:
    """The prompts of a split, to sample replies to; completions that it may hold are not read."""
    out = Dataset([], [])
    for example in split.examples:
        try:
            tokens = Tokens(prompt_ids(example.prompt, example.chat), [])
        except BadRow as reason:
            reject(split, example.origin, str(reason), cfg)
            continue
        out.examples.append(replace(example, completions=[]))
        out.rows.append(Row(tokens, "prompt"))
    out.stats = {"rows": len(out.rows), "rejected": len(split.rejected), "longest": max((r.tokens.longest for r in out.rows), default=0)}
    if split.transforms:
        out.stats["transforms"] = split.transforms
    return out


def prompts_of(data: Dataset) -> Dataset:
    """The prompts of rows, to sample replies to, in the same order."""
    rows = [Row(Tokens(row.tokens.prompt, []), "prompt") for row in data.rows]
    return Dataset(rows, [replace(e, completions=[]) for e in data.examples], data.stats)


def reduce_ranking(example: Example, pairs: str) -> Example:
    """The best and the worst completion of a ranking (`data.pairs=best_worst`), or all of it."""
    if example.kind != "ranking" or pairs == "all" or len(example.completions) <= 2:
        return example
    return replace(example, completions=[example.completions[0], example.completions[-1]])


def _add_mismatched(data: Dataset, split: str, seed: int, tokenise: Callable[[Example], Tokens]) -> int:
    """Gives every row the replies of another one, which has another prompt, rendered under its own. Of pictures the other row's have the
    same shape, as all that is scored of a row has. Returns how many rows have no such other row, and are used without."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(data.rows):
        shapes.setdefault(row.tokens.frame, []).append(i)
    other: dict[int, int] = {}
    for own in shapes.values():
        prompts = [repr([m.plain() for m in data.examples[i].prompt]) for i in own]
        # Held-out rows of one prompt are judged without, and pictures of a rare shape learned from without.
        if len(set(prompts)) > 1 or (len(prompts) > 1 and split == "train" and len(shapes) == 1):
            other |= {i: own[j] for i, j in zip(own, derangement(prompts, seed), strict=True)}
    if len(shapes) > 1 and not other and split == "train":
        raise UserError("this algorithm estimates a KL divergence from each prompt with the picture of another one, and no two rows of "
                        "different prompts have pictures of one shape; set data.buckets=null")
    for i in sorted(other):
        example, foreign = data.examples[i], data.examples[other[i]]
        swapped = Example(example.prompt, foreign.completions, "unary", chat=example.chat, origin=example.origin)
        try:
            tokens = tokenise(swapped)
        except BadRow as reason:
            raise UserError(f"{example.origin} with the reply of {foreign.origin}: {reason} (mismatched replies are needed for the KL "
                            "estimate of this objective)") from reason
        # The shared prompt can differ by a token where reply and prompt merge; the branch then carries the rest.
        own, new = data.rows[i].tokens.prompt, tokens.prompt
        if new[: len(own)] != own[: len(new)]:
            raise UserError(f"{example.origin}: the prompt tokenises differently before another reply; set data.render=chat")
        shared = min(len(own), len(new))
        data.rows[i].mismatched = tokens.branches
        if len(new) > shared:
            for branch in tokens.branches:
                branch.ids, branch.mask = new[shared:] + branch.ids, [False] * (len(new) - shared) + branch.mask
        elif len(own) > shared:
            for branch in data.rows[i].tokens.branches:
                branch.ids, branch.mask = own[shared:] + branch.ids, [False] * (len(own) - shared) + branch.mask
            data.rows[i].tokens.prompt = new
    return len(data.rows) - len(other)
