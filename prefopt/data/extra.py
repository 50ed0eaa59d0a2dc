"""Extra sequences: what an objective scores of each pair beside its two replies, under prompts of their own.

An objective names them in `Objective.extra`; each is a prompt and a reply, made from a pair by a template below. The improver's template is
also what `prefopt sample revise=N` asks for revisions with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from prefopt.data.key_phrases import degraded
from prefopt.data.records import BadRow, Completion, Example, Message
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError, nearest

SIDES = ("chosen", "rejected")
REVISE = "Please revise this answer. Write an improved version of it."
BETTER = "Please revise this answer to make it more helpful, correct, coherent and concise."
WORSE = "Please revise this answer to make it less helpful, correct, coherent and concise."
LESS_LIKED = "a picture that people like less"
COMPARE = "{question}\n\nThe answer above:\n{chosen}\n\nThe answer below:\n{rejected}\n\nWhich of the two answers is better, and why?"


@dataclass(frozen=True)
class Extra:
    """How a sequence is made: `make(pair)` gives its prompt and its reply.

    aligned: the side of the pair (0 chosen, 1 rejected) whose trained tokens it must have, because the objective compares them token by
             token; None: it may have any.
    once:    the row holds the text, so it must make one pair only.
    beside:  a picture, to be scored at the very draws of its row's own pictures; `make` leaves the prompt as it is, and the reply says what
             its caption is.
    """

    make: Callable[[Example], tuple[list[Message], list[Message]]]
    aligned: int | None = None
    once: bool = False
    beside: bool = False


def sequences(
    example: Example, own: Tokens, pairs: Sequence[tuple[int, int]], names: Sequence[str], tokenise: Callable[[Example], Tokens]
) -> list[Tokens]:
    """The tokens of the extra sequences `names` of each of `pairs` (numbers of the better and of the worse completion), pair by pair.
    `own` are the example's tokens. Raises `BadRow` where the example cannot give one, `UserError` for names that are unknown.
    """
    if not pairs:
        raise BadRow("no two of its replies that differ have different scores, so it makes no pair")
    out = []
    for places in pairs:
        pair = replace(example, completions=[example.completions[i] for i in places], kind="pair")
        for name in names:
            if name not in EXTRA:
                raise UserError(f"no extra sequence is called {name!r}{nearest(name, EXTRA)}")
            how = EXTRA[name]
            if how.once and len(pairs) > 1:
                raise BadRow(f"it makes {len(pairs)} pairs and has one {name}; set data.pairs=best_worst")
            prompt, reply = how.make(pair)
            try:  # with what stands beside it, which makes the same group of pictures
                shown = [Completion(reply), *(example.completions if how.beside else ())]
                made = tokenise(Example(prompt, shown, "extra", chat=example.chat, origin=example.origin))
                made = replace(made, branches=made.branches[:1], cut_completions=made.cut_completions[:1])
            except BadRow as reason:
                raise BadRow(f"the extra sequence {name}: {reason}") from reason
            if how.aligned is not None and _trained(made.branches[0]) != _trained(own.branches[places[how.aligned]]):
                raise BadRow(f"the extra sequence {name} has other tokens than the {SIDES[how.aligned]} reply, to which it is compared "
                             "token by token: the reply is cut there, or tokenised otherwise after another prompt; lower "
                             "data.max_completion_tokens, or set data.render=chat")
            out.append(made)
    return out


def captions_of(examples: Sequence[Example], names: Sequence[str]) -> list[Example]:
    """The further captions that the extra pictures `names` of rows will be scored under, as prompts: they are encoded beforehand."""
    texts: dict[str, None] = {}
    for how in (EXTRA[name] for name in names if name in EXTRA and EXTRA[name].beside):
        for example in examples:
            for side in (c for c in example.completions if c.picture):
                _, (said,) = how.make(replace(example, completions=[side, side], kind="pair"))
                texts[said.text] = None
    return [Example([_user(text)], [], "prompt", chat=False) for text in texts]


def _trained(branch: Branch) -> list[int]:
    return [token for token, mask in zip(branch.ids, branch.mask, strict=True) if mask]


def revision_prompt(prompt: Sequence[Message], answer: Sequence[Message], chat: bool = True, request: str = REVISE) -> list[Message]:
    """The conversation with the answer, and the request to rewrite it as a user's turn."""
    return [*prompt, *answer, _user(request if chat else f"\n{request}\n")]


def _user(text: str) -> Message:
    return Message("user", [{"type": "text", "text": text}])


def _rewritten(shown: int, reply: int, request: str, pair: Example) -> tuple[list[Message], list[Message]]:
    """One reply of the pair as the revision of one that is shown."""
    prompt = revision_prompt(pair.prompt, pair.completions[shown].messages, pair.chat, request)
    return prompt, pair.completions[reply].messages


def _rationale(pair: Example) -> tuple[list[Message], list[Message]]:
    """The question with both answers, the better one first, and the row's text that says why it is better."""
    if not pair.rationale:
        raise BadRow("it has no rationale (a text that says why the chosen reply is better), which this algorithm trains on; name its "
                     "column in data.columns.rationale, or choose another algorithm")
    earlier, question = (pair.prompt[:-1], pair.prompt[-1].text) if pair.prompt[-1].role == "user" else (pair.prompt, "")
    chosen, rejected = (c.text.strip() for c in pair.completions)
    asked = COMPARE.format(question=question, chosen=chosen, rejected=rejected).strip() + ("" if pair.chat else "\n")
    return [*earlier, _user(asked)], [Message("assistant", [{"type": "text", "text": pair.rationale}], train=True)]


def _degraded(side: int, level: int, pair: Example) -> tuple[list[Message], list[Message]]:
    """A reply of the pair without a third (level 1) or two thirds (level 2) of its key phrases; of several turns, in the last one."""
    *earlier, last = pair.completions[side].messages
    return pair.prompt, [*earlier, replace(last, content=[{"type": "text", "text": degraded(last.text, level)}])]


def less_liked(caption: str) -> str:
    """A caption that says its picture is liked less than it might be, after ABC."""
    return f"{caption.rstrip(' .')}; {LESS_LIKED}"


def _under_suffix(side: int, pair: Example) -> tuple[list[Message], list[Message]]:
    """A picture of the pair under its own caption with a suffix."""
    shown = pair.completions[side]
    if not shown.picture:
        raise BadRow("it is a text, and this algorithm is about pictures")
    caption = less_liked(shown.text.strip() or pair.prompt_text)
    return pair.prompt, [Message("assistant", [{"type": "text", "text": caption}, shown.picture], train=True)]


EXTRA: dict[str, Extra] = {
    # SRPO: reply b as the revision of reply a
    **{f"{SIDES[b]}_from_{SIDES[a]}": Extra(partial(_rewritten, a, b, REVISE)) for a in (0, 1) for b in (0, 1)},
    # T-REG: a reply as the revision of itself, for the better and for the worse
    **{f"{SIDES[y]}_if_{way}": Extra(partial(_rewritten, y, y, request), aligned=y)
       for y in (0, 1) for way, request in (("better", BETTER), ("worse", WORSE))},
    # preference learning with rationales
    "rationale": Extra(_rationale, once=True),
    # ABC: a picture under the caption of less liked pictures
    **{f"{side}_less_liked": Extra(partial(_under_suffix, y), beside=True) for y, side in enumerate(SIDES)},
    # SPO (self-supervised)
    **{f"{side}_degraded_{level}": Extra(partial(_degraded, y, level)) for y, side in enumerate(SIDES) for level in (1, 2)},
}
