"""Reasoning steps of completions. They are the parts of its messages' contents, which end to end are their text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prefopt.data.records import Example

# What stands between two steps: a blank line, else the end of a line, else that of a sentence.
BREAKS = (r"\n[^\S\n]*\n\s*", r"\n\s*", r"(?<=[.!?])\s+")


def split_steps(text: str) -> list[str]:
    """The text in pieces that are its steps: its paragraphs; of a single paragraph its lines; of a single line its sentences. What stands
    between two steps belongs to the first of them. Pieces are never blank, and end to end they are the text.
    """
    for pattern in BREAKS:
        cuts = [m.end() for m in re.finditer(pattern, text) if text[: m.start()].strip() and text[m.end() :].strip()]
        if cuts:
            return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [text]


def mark_steps(examples: Iterable[Example]) -> None:
    """Has the tokens of completions told apart by step. Messages that the data has not cut into steps are cut here."""
    for example in examples:
        for completion in example.completions:
            completion.stepwise = True
            for message in completion.messages:
                if message.train and len(message.content) == 1:
                    message.content = [{"type": "text", "text": piece} for piece in split_steps(message.text)]
