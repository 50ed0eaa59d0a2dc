"""Picks short, length-balanced pairs with a clear winner from real preference data, and keeps some prompts apart for judging.

Reads any file that `data=jsonl` reads: pairs (Anthropic hh-rlhf: two dialogues with a shared beginning) and rankings with scores
(alpaca_eval results). Writes OUT/train.jsonl and OUT/eval.jsonl for data.path and data.eval; says what was left out, and why.
No chance is involved: prompts are ordered by their hash, so the same file gives the same pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf

from prefopt.config.schema import ColumnsConfig, DataConfig, ModelConfig, TrustConfig
from prefopt.data.records import BadRow, Completion, Example, parse_row
from prefopt.data.sources import read_file
from prefopt.data.tokenise import Tokens
from prefopt.errors import UserError

MODELS = Path(__file__).resolve().parent.parent / "conf" / "model"


@dataclass
class Pair:
    """Lengths are in tokens of the model, its end token included; `gap` is None where people chose and nobody gave scores."""

    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]
    tokens: int  # of prompt and longer reply, as the model reads them
    longer: int  # tokens of the chosen reply minus those of the rejected one
    gap: float | None
    key: str  # hash of the prompt

    @property
    def row(self) -> dict:
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected, "gap": self.gap}


def pairs_of(example: Example) -> Iterator[tuple[Completion, Completion, float | None]]:
    """Every (better, worse, score gap) of a pair or a ranking."""
    for better, worse in itertools.combinations(example.completions, 2):  # best first
        scored = better.score is not None
        if not scored or better.score > worse.score:
            yield better, worse, better.score - worse.score if scored else None


def select(rows: Iterator, tokenise: Callable[[Example], Tokens], left_out: Counter, max_tokens: int, min_gap: float,
           max_ratio: float) -> list[Pair]:
    """The pairs of `rows` within the limits; counts the others in `left_out` by reason."""
    found, columns = [], asdict(ColumnsConfig())
    for origin, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            example = parse_row(row, columns, origin)
        except BadRow as reason:
            left_out[f"row not usable: {reason}"] += 1
            continue
        if example.kind not in ("pair", "ranking"):
            left_out[f"a {example.kind} row, not a pair"] += 1
            continue
        for better, worse, gap in pairs_of(example):
            if gap is not None and gap < min_gap:
                left_out[f"score gap under {min_gap:g}"] += 1
                continue
            two = Example(example.prompt, [better, worse], "pair", chat=example.chat, origin=origin)
            try:
                tokens = tokenise(two)
            except BadRow as reason:
                left_out[f"row not usable: {reason}"] += 1
                continue
            good, bad = (len(b.ids) for b in tokens.branches)
            if tokens.longest > max_tokens:
                left_out[f"over {max_tokens} tokens"] += 1
            elif max(good, bad) > max_ratio * min(good, bad):
                left_out[f"one reply over {max_ratio:g} times as long as the other"] += 1
            else:
                plain = [[m.plain() for m in part] for part in (example.prompt, better.messages, worse.messages)]
                key = hashlib.sha256(example.prompt_text.encode()).hexdigest()
                found.append(Pair(*plain, tokens.longest, good - bad, gap, key))
    return found


def clearest(pairs: list[Pair], count: int, left_out: Counter) -> list[Pair]:
    """At most `count` pairs of each prompt: the widest gaps, of the length order that is short of pairs where there is a choice."""
    by_prompt = defaultdict(list)
    for pair in sorted(pairs, key=lambda p: -(p.gap or 0.0)):
        by_prompt[pair.key].append(pair)
    out: list[Pair] = []
    lead = 0  # pairs whose chosen reply is longer, minus those whose chosen reply is shorter
    for key in sorted(by_prompt):
        rest = by_prompt[key]
        for _ in range(min(count, len(rest))):
            pair = next((p for p in rest if p.longer * lead < 0), rest[0])
            rest.remove(pair)
            lead += (pair.longer > 0) - (pair.longer < 0)
            out.append(pair)
        left_out[f"more than {count} of one prompt"] += len(rest)
    return out


def balanced(pairs: list[Pair], left_out: Counter) -> list[Pair]:
    """As many pairs whose chosen reply is the longer one as pairs whose rejected reply is: "take the longer one" is right half the time.

    Drops the narrowest gaps of the larger side.
    """
    longer, shorter = ([p for p in pairs if p.longer * sign > 0] for sign in (1, -1))
    more, fewer = sorted((longer, shorter), key=len, reverse=True)
    surplus = sorted(more, key=lambda p: (-(p.gap or 0.0), p.key))[len(fewer):]
    left_out["too many with the chosen reply " + ("longer" if more is longer else "shorter")] += len(surplus)
    dropped = {id(p) for p in surplus}
    return [p for p in pairs if id(p) not in dropped]


def divide(pairs: list[Pair], held_out: int, per_prompt: int, left_out: Counter) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, about `held_out` held-out pairs): one pair for each held-out prompt, and no prompt on both sides."""
    keys = sorted({p.key for p in pairs})
    if len(keys) <= held_out:
        raise UserError(f"{len(pairs)} pairs of {len(keys)} prompts are left, too few to keep {held_out} prompts apart; loosen a limit")
    apart = set(keys[:held_out])
    train = clearest([p for p in pairs if p.key not in apart], per_prompt, left_out)
    judge = clearest([p for p in pairs if p.key in apart], 1, left_out)
    train, judge = balanced(train, left_out), balanced(judge, left_out)
    if not (train and judge):
        raise UserError("no pair is left on one side: the chosen reply is always the longer one there, or never; loosen a limit")
    return train, judge


def model_tokeniser(model: str) -> Callable[[Example], Tokens]:
    """The tokeniser of conf/model/`model`.yaml with its chat template, as a run would use it."""
    from prefopt.policies.loading import load_tokeniser

    cfg = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(MODELS / f"{model}.yaml"))
    return load_tokeniser(OmegaConf.to_object(cfg), DataConfig(name="pairs", source="files"), TrustConfig())


def describe(name: str, pairs: list[Pair]) -> str:
    tokens = sorted(p.tokens for p in pairs)
    order = Counter((p.longer > 0) - (p.longer < 0) for p in pairs)
    gaps = sorted(p.gap for p in pairs if p.gap is not None)
    gap = f"; score gap {gaps[0]:.1f} to {gaps[-1]:.1f}, median {gaps[len(gaps) // 2]:.1f}" if gaps else ""
    return (f"{name}: {len(pairs)} pairs of {len({p.key for p in pairs})} prompts; tokens of prompt and longer reply: median "
            f"{tokens[len(tokens) // 2]}, at most {tokens[-1]}; chosen is longer in {order[1]}, shorter in {order[-1]}, equal in {order[0]}"
            f"{gap}")


def main(argv: list[str] | None = None, tokenise: Callable[[Example], Tokens] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="jsonl or parquet file of real preference data")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokens are counted, by its name in conf/model")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest prompt with reply")
    parser.add_argument("--min-gap", type=float, default=0.0, help="smallest difference of scores, where there are scores")
    parser.add_argument("--max-ratio", type=float, default=1.5, help="longer reply over shorter reply, in tokens")
    parser.add_argument("--per-prompt", type=int, default=1, help="training pairs of one prompt, at most")
    parser.add_argument("--held-out", type=int, default=150, help="prompts kept for judging, one pair each")
    args = parser.parse_args(argv)
    left_out: Counter = Counter()
    try:
        tokenise = tokenise or model_tokeniser(args.model)
        pairs = select(read_file(args.file), tokenise, left_out, args.max_tokens, args.min_gap, args.max_ratio)
        parts = dict(zip(("train", "eval"), divide(pairs, args.held_out, args.per_prompt, left_out), strict=True))
        args.out.mkdir(parents=True, exist_ok=True)
        for name, chosen in parts.items():
            lines = [json.dumps(p.row, ensure_ascii=False) + "\n" for p in chosen]
            (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(describe(name, chosen))
    except UserError as error:
        print(f"real_pairs: {error}", file=sys.stderr)
        return 2
    finally:
        for reason, count in left_out.most_common():
            if count:
                print(f"left out {count}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
