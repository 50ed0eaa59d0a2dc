"""How often a trained adapter ranks the chosen reply first, before and after, with plain transformers and PEFT: nothing of prefopt.

Reads pairs of chat messages (prompt, chosen, rejected) and a folder that `prefopt train` wrote as model/. A tie counts as half a win.
Intervals are 95 %: Wilson's for a share, normal for the mean gain per pair.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def wilson(wins: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    p, z2 = wins / n, Z95 * Z95
    centre, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return centre - half, centre + half


def wins(margins: Sequence[float]) -> list[float]:
    """1 for a pair whose chosen reply is ahead, 0 where it is behind, one half for a tie."""
    return [0.5 * (1 + (m > 0) - (m < 0)) for m in margins]


def share_line(name: str, margins: Sequence[float]) -> str:
    won = sum(wins(margins))
    low, high = wilson(won, len(margins))
    return f"{name:<44} {won / len(margins):.3f} [{low:.3f}, {high:.3f}]"


def gain_line(name: str, before: Sequence[float], after: Sequence[float]) -> str:
    """Mean gain with its interval over pairs: the same pairs were judged twice."""
    gains = [a - b for a, b in zip(wins(after), wins(before), strict=True)]
    mean, n = sum(gains) / len(gains), len(gains)
    half = Z95 * math.sqrt(sum((g - mean) ** 2 for g in gains) / (n - 1) / n)
    better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    return f"{name:<44} {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]   {better} pairs became right, {worse} wrong"


def encode(tokenizer, prompt: list[dict], reply: list[dict]) -> tuple[list[int], int]:
    """(token ids, length of the prompt). What the template writes after the end-of-turn token (a newline) is cut off."""
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*prompt, *reply], tokenize=False)
    start, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (head, text))
    if ids[: len(start)] != start or tokenizer.eos_token_id not in ids[len(start) :]:
        raise SystemExit("rank_pairs: this chat template does not add replies that end with the end-of-sequence token to a fixed prompt")
    while ids[-1] != tokenizer.eos_token_id:
        ids.pop()
    return ids, len(start)


Scores = list[tuple[float, float]]  # log-prob of the chosen and of the rejected reply, nats, pair by pair


def score(rows: list[dict], adapter: Path, base: str) -> tuple[Scores, Scores, list[tuple[int, int]]]:
    """(scores without the adapter, scores with it, tokens of both replies)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()

    @torch.no_grad()
    def logp(ids: list[int], start: int) -> float:
        x = torch.tensor([ids])
        logits = model(input_ids=x).logits[0, start - 1 : -1]
        return float(logits.log_softmax(-1).gather(-1, x[0, start:, None]).sum())

    before, after, lengths = [], [], []
    for row in rows:
        sides = [encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        lengths.append(tuple(len(ids) - start for ids, start in sides))
        after.append(tuple(logp(*side) for side in sides))
        with model.disable_adapter():
            before.append(tuple(logp(*side) for side in sides))
    return before, after, lengths


def report(before: Scores, after: Scores, lengths: list[tuple[int, int]]) -> list[str]:
    """The table, line by line."""
    total = [[a - b for a, b in scores] for scores in (before, after)]
    mean = [[a / m - b / n for (a, b), (m, n) in zip(scores, lengths, strict=True)] for scores in (before, after)]
    lines = [f"{len(lengths)} pairs; share in which the chosen reply is ahead", share_line("longer reply", [m - n for m, n in lengths])]
    for name, (start, end) in (("log-prob", total), ("log-prob per token", mean)):
        lines += [share_line(f"{name}, before", start), share_line(f"{name}, after", end), gain_line(f"{name}, gain", start, end)]
    ratio = [a - b for a, b in zip(total[1], total[0], strict=True)]
    lines.append(share_line("log-ratio of after to before (DPO's reward)", ratio))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="jsonl file with prompt, chosen and rejected as chat messages")
    parser.add_argument("adapter", type=Path, help="model/ folder of a LoRA run")
    parser.add_argument("--base", required=True, help="hub id or folder of the model the adapter belongs to")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    print("\n".join(report(*score(rows, args.adapter, args.base))))


if __name__ == "__main__":
    main()
