"""Revision at inference: a policy is shown its own reply and asked for a better one, as often as wanted (arXiv 2406.01660)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.config.schema import SamplerConfig
from prefopt.data.extra import revision_prompt
from prefopt.data.records import BadRow, Example, Message
from prefopt.errors import UserError


def self_revise(policy: Any, examples: Sequence[Example], sampler: SamplerConfig, seed: int, revisions: int) -> list[list[str]]:
    """For each example's prompt the first reply and then so many revisions, each of the reply before it.

    The conversation that asks for a revision is the one that `algo=srpo` trains on. Revision n is drawn with `seed` + n. Raises `UserError`
    where a conversation is longer than its limit.
    """
    prompts = [(example.prompt, example) for example in examples]
    written: list[list[str]] = [[] for _ in examples]
    for number in range(revisions + 1):
        try:
            ids = [policy.prompt_ids(list(prompt), example.chat) for prompt, example in prompts]
        except BadRow as reason:
            raise UserError(f"{f'revision {number}' if number else 'the prompt'}: {reason}") from reason
        replies = policy.generate(ids, sampler, seed + number)
        for texts, reply in zip(written, replies, strict=True):
            texts.append(reply.text)
        shown = ([Message("assistant", [{"type": "text", "text": reply.text}])] for reply in replies)
        prompts = [(revision_prompt(e.prompt, answer, e.chat), e) for e, answer in zip(examples, shown, strict=True)]
    return written
