"""Data transforms for captioned pictures: losers and wrong captions made of what is there, and a small subset of pairs worth training on.

They are kinds like those of `transform_kinds`; importing this module registers them.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from prefopt.data.pictures import parse_op
from prefopt.data.records import BadRow, Completion, Example, Message
from prefopt.data.transform_kinds import Job, gap_of, kind
from prefopt.errors import UserError


def _winner(example: Example, job: Job) -> Completion:
    """The picture that a row speaks for: its first, which is the chosen one, the best, or the only one."""
    first = example.completions[0] if example.completions else None
    if first is None or first.picture is None:
        raise job.refuse(example, "makes pairs of captioned pictures, and this row's side is no picture")
    if first.desirable is False:
        raise job.refuse(example, "takes each row's picture for a good one, and this one has a thumbs-down; leave such rows out")
    return replace(first, desirable=None)


def _pair(example: Example, chosen: Completion, rejected: Completion) -> Example:
    """A row with new sides: what was known of the old preference is gone."""
    return replace(example, kind="pair", completions=[chosen, rejected], label=1.0, margin=0.0, rationale="")


# ---- losers made of winners ---------------------------------------------------------------------------


@kind("pair", "ranking", "unary", "demonstration")
def other_pictures(rows: list[Example], job: Job) -> list[Example]:
    """Each row's picture against that of a row with another caption, under its own: the shuffle of SUDO's code (2504.14534), over all rows
    and without fixed points. Rejected pictures that the rows may have are not used. Rows whose partner shows the same picture are left out.
    """
    from prefopt.data.batch import derangement  # imports torch, which composing a config does not need

    if len(rows) < 2:
        raise UserError(f"data.transforms.{job.name} takes losers from other rows, and there is {len(rows)} row")
    winners = [_winner(e, job) for e in rows]
    out = []
    for e, own, other in zip(rows, winners, derangement([e.prompt_text for e in rows], job.rng.randrange(2**31)), strict=True):
        foreign = Message("assistant", [winners[other].picture], train=True)
        if own.picture == winners[other].picture:
            job.counts["left out, the other row has the same picture"] += 1
        else:
            said = [{"type": "text", "text": own.text}] if own.text.strip() else []  # a caption of its own holds for both sides
            out.append(_pair(e, replace(own, score=None), Completion([replace(foreign, content=[*said, *foreign.content])])))
    job.counts["losers from other rows"] += len(out)
    return out


@kind("pair", "ranking", "unary", "demonstration")
def damaged_pictures(rows: list[Example], job: Job, *, ops: str = "blur:2") -> list[Example]:
    """Each row's picture against itself after `ops`, operations with blanks between them, as in "crop:0.5 jpeg:10" (`data.pictures`)."""
    added = ops.split()
    try:
        for op in added:
            parse_op(op)
    except BadRow as reason:
        raise UserError(f"data.transforms.{job.name}.ops={ops}: {reason}") from reason
    if not added:
        raise UserError(f"data.transforms.{job.name}.ops names no operation, as in blur:2; without one a picture would be its own loser")
    out = []
    for e in rows:
        own = _winner(e, job)
        messages = [replace(m, content=[{**p, "ops": [*p.get("ops", ()), *added]} if p["type"] == "image" else p for p in m.content])
                    for m in own.messages]
        out.append(_pair(e, replace(own, score=None), Completion(messages)))
    job.counts[f"losers made with {ops}"] += len(out)
    return out


# ---- wrong captions -----------------------------------------------------------------------------------

# Words that stand for one another: exchanging one makes a caption wrong that was right, mostly. By axis, of which there are four.
CLASSES: dict[str, tuple[str, ...]] = {
    "attribute": (
        "red orange yellow green blue purple pink brown black white grey gold silver", "small large tiny huge", "old young",
        "wooden metal glass",
        "bright dark", "happy sad angry calm", "long short", "sunny rainy snowy foggy", "realistic abstract",
    ),
    "number": ("one two three four five six seven",),
    "place": (
        "left right", "top bottom", "above below", "inside outside", "behind beside", "indoors outdoors", "standing sitting lying",
        "walking running flying swimming", "forest desert beach city village mountain", "morning evening", "day night", "summer winter",
    ),
    "content": (
        "circle square triangle cross star", "circles squares triangles crosses stars", "cat dog horse bird fish rabbit fox bear",
        "cats dogs horses birds", "man woman boy girl robot", "men women boys girls robots", "car bus train boat bicycle truck",
        "cars buses trains boats",
        "house castle tower bridge church", "tree flower bush", "trees flowers bushes", "apple banana orange lemon", "table chair bed sofa",
        "photo painting drawing sketch", "king queen", "dragon unicorn", "guitar piano violin", "sun moon", "river lake ocean",
    ),
}  # fmt: skip
WORD = re.compile(r"[A-Za-z]+")


def _swaps(caption: str, axes: Sequence[str]) -> list[tuple[int, int, list[str]]]:
    """(begin, end, words that may stand there instead) of each word of a caption that belongs to a class."""
    found = []
    for match in WORD.finditer(caption):
        word = match[0].lower()
        classes = [members.split() for axis in axes for members in CLASSES[axis] if word in members.split()]
        if others := sorted({other for members in classes for other in members} - {word}):
            found.append((match.start(), match.end(), others))
    return found


@kind("pair", "ranking", "unary", "demonstration", rules=("words >= 1",))
def wrong_captions(rows: list[Example], job: Job, *, axes: str = "attribute number place content", words: int = 1) -> list[Example]:
    """Each row's picture under its caption against the same picture under a wrong one (TPO, 2509.25771): `words` words of the caption are
    exchanged for others of their kind, along the `axes`. The paper lets a language model do it. Captions without such a word are left out.
    """
    if unknown := set(axes.split()) - set(CLASSES) or (not axes.split() and {"nothing"}):
        raise UserError(f"data.transforms.{job.name}.axes={axes}: there is no axis {sorted(unknown)[0]} (known: {', '.join(CLASSES)})")
    out = []
    for e in rows:
        own = _winner(e, job)
        caption = own.text if own.text.strip() else e.prompt_text
        places = _swaps(caption, axes.split())
        if not places:
            job.counts["left out, no word of the caption can be exchanged"] += 1
            continue
        wrong = caption
        for begin, end, others in sorted(job.rng.sample(places, min(words, len(places))), reverse=True):  # from the end: places hold
            other = job.rng.choice(others)
            wrong = wrong[:begin] + (other.capitalize() if wrong[begin].isupper() else other) + wrong[end:]
        right, other = ([Message("assistant", [{"type": "text", "text": text}, own.picture], train=True)] for text in (caption, wrong))
        out.append(_pair(e, Completion(right), Completion(other)))
    job.counts["wrong captions"] += len(out)
    return out


# ---- a small subset -----------------------------------------------------------------------------------

FLOOR = 1e-3  # the least distance to a neighbour that a logarithm is taken of


def _vector(text: str) -> dict[str, float]:
    """How often each word and each two neighbours stand in a text, as a vector of length 1."""
    words = [w.lower() for w in WORD.findall(text)]
    counts = Counter([*words, *(" ".join(two) for two in zip(words, words[1:], strict=False))])
    norm = math.sqrt(sum(n * n for n in counts.values())) or 1.0
    return {word: n / norm for word, n in counts.items()}


def distances(texts: Sequence[str], k: int) -> list[float]:
    """Of each of different texts the Euclidean distance of its vector to its k-th nearest neighbour, at most sqrt(2)."""
    vectors, holders = [_vector(text) for text in texts], {}
    for i, vector in enumerate(vectors):
        for word, value in vector.items():
            holders.setdefault(word, []).append((i, value))
    out = []
    for i, vector in enumerate(vectors):
        alike: dict[int, float] = {}
        for word, value in vector.items():
            for j, other in holders[word]:
                alike[j] = alike.get(j, 0.0) + value * other
        alike.pop(i, None)
        nearest = heapq.nlargest(k, alike.values())
        cosine = nearest[k - 1] if len(nearest) == k else 0.0
        out.append(math.sqrt(max(2 - 2 * cosine, 0.0)))
    return out


@kind("pair", rules=("keep >= 1", "alpha >= 0", "gamma >= 0", "neighbours >= 1"))
def fifa(
    rows: list[Example], job: Job, *, keep: int, alpha: float = 0.0, quality: str = "prompt_quality", gamma: float = 0.5,
    neighbours: int = 1,
) -> list[Example]:
    """FiFA (2410.10166): the `keep` pairs with the largest |gap of scores| + alpha quality + gamma log distance, ties in the order of rows.

    Quality is a column (the paper asks a language model), read where alpha > 0. The distance is that of the prompt to its neighbour of this
    number among the other prompts, in words and pairs of words; of rows with one prompt all but the best have no distance to speak of. How
    the paper weighs the three is not known to us.
    """
    base = []
    for e in rows:
        value = e.meta.get(quality, 0.0)
        if alpha and (quality not in e.meta or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise job.refuse(e, f"reads the quality of prompts from the column {quality}, and the row has no number there; set alpha=0")
        base.append(abs(gap_of(e, job)) + (alpha * float(value) if alpha else 0.0))
    order = sorted(range(len(rows)), key=lambda i: (-base[i], i))
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(rows[i].prompt_text, i)
    far = dict(zip(first.values(), distances(list(first), neighbours), strict=True)) if gamma else {}
    worth = [b + (gamma * math.log(max(far.get(i, 0.0), FLOOR)) if gamma else 0.0) for i, b in enumerate(base)]
    kept = set(sorted(range(len(rows)), key=lambda i: (-worth[i], i))[:keep])
    job.counts["pairs left out"] += len(rows) - len(kept)
    return [e for i, e in enumerate(rows) if i in kept]
