"""A small readable world with a known reward: animals, places, and replies about them.

A prompt asks about one animal at one place, perhaps in a style: "Tell me about the fox at the harbour,
briefly." A reply opens with "The {colour} {animal} {verb} {where} the {place}." and goes on with up to four
short sentences that are kind, unkind, informative, warm, or mere padding. What a reply is worth is computed
from its words by `true_reward`, so that reward and win rate of a trained model are measured, not judged.

Every row is drawn from (seed, split, index) alone: row i is the same however many rows are asked for, and
`label_noise` and `length_bias` can change only which of its two replies is the chosen one.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

from prefopt.errors import UserError, nearest

ANIMALS = tuple("badger bear cat crow deer dog duck fox goat hare heron horse mouse otter owl wolf".split())
PLACES = tuple(
    "barn beach bridge castle chapel forest garden harbour lake "
    "market meadow mill orchard river station tower".split()
)
STYLES = ("", "briefly", "warmly", "in detail")
SPLITS = ("train", "eval")

SLOTS = {
    "animal": ANIMALS,
    "place": PLACES,
    "colour": tuple("black brown golden grey red silver spotted white".split()),
    "verb": tuple("plays rests sings sits sleeps waits walks wanders".split()),
    "where": tuple("at behind beside by near".split()),
    "good": tuple(
        "brave bright calm cheerful clever friendly gentle graceful kind patient playful tender".split()
    ),
    "bad": tuple("bitter cruel dirty greedy grim lazy mean rude selfish spiteful".split()),
    "plain": tuple("long narrow old round short small".split()),
    "food": tuple("apples berries bread clover grain honey".split()),
    "time": tuple("dawn dusk midnight noon sunrise sunset".split()),
}
OPENING = "The {colour} {animal} {verb} {where} the {place}."
SENTENCES = {
    "good": (
        "It is {good}.",
        "It is {good} to every visitor.",
        "It has a {good} voice.",
        "Children call it {good}.",
    ),
    "bad": (
        "It is {bad}.",
        "It is {bad} to every visitor.",
        "It has a {bad} voice.",
        "Children call it {bad}.",
    ),
    "detail": ("It eats {food} at {time}.", "It has a {plain} tail.", "It looks {plain} at {time}."),
    "warm": ("You would love it, dear friend.", "Come and see it, dear friend."),
    "filler": (
        "There is not much more to say about that.",
        "As far as anyone can tell, that is how it goes there.",
        "One could go on and on about it for hours.",
    ),
}
_GOOD, _BAD = frozenset(SLOTS["good"]), frozenset(SLOTS["bad"])
_DETAIL = frozenset(SLOTS["plain"] + SLOTS["food"] + SLOTS["time"])
_WARM = frozenset({"friend"})
_TELLING = _GOOD | _BAD | _DETAIL | _WARM
_NAMES = ANIMALS + PLACES

# Per style: how many words are free, and what each further word costs (nats).
_LENGTH = {"": (16, 0.08), "briefly": (9, 0.16), "warmly": (18, 0.08), "in detail": (26, 0.08)}
LOWEST_REWARD = -5.0
_MAX_DETAILS = 4
# How often a drawn reply names another animal, and how often another place, than the one asked for.
_SLIP = 0.08


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _fill(template: str, rng: random.Random, **given: str) -> str:
    """The template with every slot filled: from `given`, else by a draw."""
    return re.sub(r"\{(\w+)\}", lambda slot: given.get(slot[1]) or rng.choice(SLOTS[slot[1]]), template)


def _templates() -> tuple[str, ...]:
    return (OPENING, *itertools.chain.from_iterable(SENTENCES.values()))


@cache
def _known_pairs() -> frozenset[tuple[str, str]]:
    """Every pair of neighbouring tokens in a sentence of the world; "." stands for both its ends."""
    pairs: set[tuple[str, str]] = set()
    for template in _templates():
        parts = re.findall(r"\{\w+\}|\w+|[^\w\s]", template)
        options = [(".",), *(SLOTS[part[1:-1]] if part[0] == "{" else (part.lower(),) for part in parts)]
        for left, right in itertools.pairwise(options):
            pairs.update(itertools.product(left, right))
    return frozenset(pairs)


def _prompt(animal: str, place: str, style: str) -> str:
    return f"Tell me about the {animal} at the {place}{', ' + style if style else ''}."


def _in_split(animal: str, place: str, split: str) -> bool:
    """A quarter of the combinations is held out; every animal and every place occurs in both splits."""
    held_out = (ANIMALS.index(animal) + PLACES.index(place)) % 4 == 0
    return held_out == (split == "eval")


def _cells(split: str) -> list[tuple[str, str, str]]:
    """All (animal, place, style) of a split."""
    return [cell for cell in itertools.product(ANIMALS, PLACES, STYLES) if _in_split(cell[0], cell[1], split)]


@lru_cache(maxsize=8)
def _shuffled(split: str, seed: int, round_: int) -> tuple[tuple[str, str, str], ...]:
    """All (animal, place, style) of a split in the order of one pass through them."""
    cells = _cells(split)
    random.Random(f"tiny_feedback/order/{seed}/{split}/{round_}").shuffle(cells)
    return tuple(cells)


def _cell(split: str, seed: int, index: int) -> tuple[str, str, str]:
    size = len(_shuffled(split, seed, 0))
    return _shuffled(split, seed, index // size)[index % size]


def _reply(animal: str, place: str, rng: random.Random) -> str:
    """A reply of any quality, 7 to about 45 words. The style plays no part: it is left to be learnt."""
    named = {
        "animal": rng.choice(ANIMALS) if rng.random() < _SLIP else animal,
        "place": rng.choice(PLACES) if rng.random() < _SLIP else place,
    }
    sentences = [_fill(OPENING, rng, **named)]
    kindness = rng.random()
    weights = {"good": 3 * kindness, "bad": 2 * (1 - kindness), "detail": 1.2, "warm": 0.5, "filler": 1.0}
    length = 1 + rng.choices(range(5), (1, 2, 3, 2, 2))[0]
    while len(sentences) < length:
        kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
        sentence = _fill(rng.choice(SENTENCES[kind]), rng)
        if sentence not in sentences:
            sentences.append(sentence)
    return " ".join(sentences)


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _check_rows(split: str, count: int, seed: int) -> None:
    if split not in SPLITS:
        raise UserError(f"data.split {split!r} is not a split of tiny_feedback{nearest(str(split), SPLITS)}.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"data.count is {count!r}; give a whole number of rows, 1 or more.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"data.seed is {seed!r}; give a whole number.")


def _check_number(key: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{key} is {value!r}; give a number from {low:g} to {high:g}.")


def word_count(text: str) -> int:
    """Words of a text, punctuation not counted."""
    return len(re.findall(r"\w+", text))


def prompts(split: str) -> list[str]:
    """All prompts of a split, in a fixed order: 768 for "train", 256 for "eval", none in both."""
    _check_rows(split, 1, 0)
    return [_prompt(*cell) for cell in _cells(split)]


def true_reward(prompt: str, completion: str) -> float:
    """What a completion is worth under a prompt, in Bradley-Terry nats; at least `LOWEST_REWARD`.

    The sum of

    - names: +1 if the asked animal is named, else -1; the same for the place; -0.5 for each other name;
    - tone: 2 (1 - 0.6^g) for g different good words (+0.80, +0.48, +0.29, ...); -0.6 for each different bad
      word;
    - style: "warmly" pays 1 for the word "friend"; "in detail" pays 0.5 for each different detail (plain
      adjective, food, time of day), at most 4 of them;
    - length: words beyond what the style leaves free cost 0.08 each (free: 16; "warmly" 18; "in detail" 26),
      or 0.16 under "briefly" (free: 9);
    - repetition: -0.3 for each good, bad, detail or warm word said again, -0.5 for each sentence said again;
    - form: -0.75 for each pair of neighbouring words that no sentence of the world holds (so an unknown word
      costs 1.5), -1 if the last sentence is not ended.

    Case and spacing do not matter; any text is accepted as a completion. Raises UserError for a prompt that
    does not ask about one of the world's animals at one of its places.
    """
    asked = _tokens(prompt)
    animal = next((word for word in asked if word in ANIMALS), None)
    place = next((word for word in asked if word in PLACES), None)
    if animal is None or place is None:
        raise UserError(
            f"tiny_feedback's true reward knows prompts such as {_prompt('fox', 'harbour', 'briefly')!r}, "
            f"not {prompt[:80]!r}; use it with data=tiny_feedback."
        )
    style = next((style for style in STYLES if style and style.split()[-1] in asked), "")

    tokens = _tokens(completion)
    words = [token for token in tokens if token[0].isalnum() or token[0] == "_"]
    said = set(words)
    names = said.intersection(ANIMALS) | said.intersection(PLACES)

    reward = sum(1.0 if name in said else -1.0 for name in (animal, place))
    reward -= 0.5 * len(names - {animal, place})
    reward += 2.0 * (1.0 - 0.6 ** len(said & _GOOD)) - 0.6 * len(said & _BAD)
    if style == "warmly" and said & _WARM:
        reward += 1.0
    if style == "in detail":
        reward += 0.5 * min(len(said & _DETAIL), _MAX_DETAILS)

    free, cost = _LENGTH[style]
    reward -= cost * max(0, len(words) - free)

    telling = [word for word in words if word in _GOOD or word in _BAD or word in _DETAIL or word in _WARM]
    sentences = [sentence.strip() for sentence in " ".join(tokens).split(".") if sentence.strip()]
    reward -= 0.3 * (len(telling) - len(set(telling))) + 0.5 * (len(sentences) - len(set(sentences)))

    known = _known_pairs()
    reward -= 0.75 * sum(pair not in known for pair in itertools.pairwise([".", *tokens]))
    if not tokens or tokens[-1] != ".":
        reward -= 1.0
    return max(LOWEST_REWARD, reward)


def rows(
    split: str, count: int, seed: int = 0, label_noise: float = 0.0, length_bias: float = 0.0, completions: int = 2
) -> Iterator[dict[str, object]]:
    """Preference pairs: prompt, chosen and rejected as chat messages, and the two replies' true rewards.

    The label is one draw from Bradley-Terry on `true_reward + length_bias * words / 10`, flipped with
    probability `label_noise`. `chosen_reward` and `rejected_reward` hold the true reward, without the judge's
    taste for length; `rationale` says why the chosen one is better; `chosen_hallucinated` and
    `rejected_hallucinated` are 1 where a reply `hallucinates`. With more than two `completions` a row is a
    ranking: that many different replies and their `scores`, which are `true_reward + length_bias * words / 10`, given
    out in the opposite order (the best reply gets the lowest) with probability `label_noise`.
    Raises UserError at the call, not at the first row.
    """
    _check_rows(split, count, seed)
    _check_number("data.label_noise", label_noise, 0.0, 0.5)
    _check_number("data.length_bias", length_bias, -10.0, 10.0)
    if completions > 2:
        return (_ranking(split, seed, index, completions, label_noise, length_bias) for index in range(count))
    return (_pair(split, seed, index, label_noise, length_bias) for index in range(count))


def rationale(prompt: str, chosen: str, rejected: str) -> str:
    """Why the chosen reply is the better one: a sentence for each thing that `true_reward` counts in which it is ahead, in words that the
    world's model knows. It may be ahead in none, where a label is noisy or a draw.
    """
    asked = _tokens(prompt)
    style = next((style for style in STYLES if style and style.split()[-1] in asked), "")
    better, worse = _tokens(chosen), _tokens(rejected)
    said, other = set(better), set(worse)
    why = [f"It is about the {name}." for name in asked if name in _NAMES and name in said - other]
    why += [f"It is not about the {name}." for name in _NAMES if name in other - said and name not in asked]
    good, bad = [w for w in SLOTS["good"] if w in said], [w for w in SLOTS["bad"] if w in other]
    if len(good) > len(other & _GOOD):
        why.append(f"It is {' and '.join(good)}.")
    if len(bad) > len(said & _BAD):
        why.append(f"It is not {' and '.join(bad)}.")
    if style == "warmly" and said & _WARM and not other & _WARM:
        why.append("It is to a dear friend.")
    if style == "in detail" and min(len(said & _DETAIL), _MAX_DETAILS) > len(other & _DETAIL):
        why.append("It is in detail.")
    if word_count(rejected) > max(word_count(chosen), _LENGTH[style][0]):
        why.append("It is not on and on for hours.")
    if _repeated(worse) > _repeated(better):
        why.append("It is not to say that on and on.")
    return " ".join(why) or "As far as anyone can tell, there is not much more to it."


def _repeated(tokens: list[str]) -> int:
    """How often a telling word is said again."""
    telling = [word for word in tokens if word in _TELLING]
    return len(telling) - len(set(telling))


def _pair(split: str, seed: int, index: int, label_noise: float, length_bias: float) -> dict[str, object]:
    rng = random.Random(f"tiny_feedback/pair/{seed}/{split}/{index}")
    animal, place, style = _cell(split, seed, index)
    prompt = _prompt(animal, place, style)
    first = second = _reply(animal, place, rng)
    while second == first:
        second = _reply(animal, place, rng)
    rewards = {reply: true_reward(prompt, reply) for reply in (first, second)}
    judged = {reply: reward + length_bias * word_count(reply) / 10 for reply, reward in rewards.items()}
    # Both are drawn whatever the settings are: a noisy set is the clean one with some labels flipped.
    label_draw, flip_draw = rng.random(), rng.random()
    first_wins = label_draw < 1.0 / (1.0 + math.exp(judged[second] - judged[first]))
    if flip_draw < label_noise:
        first_wins = not first_wins
    chosen, rejected = (first, second) if first_wins else (second, first)
    return {
        "prompt": _message("user", prompt),
        "chosen": _message("assistant", chosen),
        "rejected": _message("assistant", rejected),
        "chosen_reward": rewards[chosen],
        "rejected_reward": rewards[rejected],
        "rationale": rationale(prompt, chosen, rejected),
        "chosen_hallucinated": int(hallucinates(prompt, chosen)),
        "rejected_hallucinated": int(hallucinates(prompt, rejected)),
    }


def _ranking(split: str, seed: int, index: int, count: int, label_noise: float, length_bias: float) -> dict[str, object]:
    rng = random.Random(f"tiny_feedback/ranking/{seed}/{split}/{index}")
    animal, place, style = _cell(split, seed, index)
    prompt, scores = _prompt(animal, place, style), {}
    while len(scores) < count or len(set(scores.values())) == 1:
        if len(scores) == count:
            scores.popitem()
        reply = _reply(animal, place, rng)
        scores[reply] = true_reward(prompt, reply) + length_bias * word_count(reply) / 10
    if rng.random() < label_noise:
        scores = reversed_scores(scores)
    return {
        "prompt": _message("user", prompt),
        "completions": [_message("assistant", reply) for reply in scores],
        "scores": list(scores.values()),
    }


def reversed_scores(scores: dict[Any, float]) -> dict[Any, float]:
    """The same scores on the same items in the opposite order of merit; of two items, that is a flipped label."""
    order = sorted(scores, key=scores.get)
    return dict(zip(scores, (scores[order[-1 - order.index(item)]] for item in scores), strict=True))


def hallucinates(prompt: str, completion: str) -> bool:
    """Whether a completion tells of an animal or a place that the prompt does not ask about."""
    return bool(set(_tokens(completion)).intersection(ANIMALS + PLACES) - set(_tokens(prompt)))


# What a reply is worth, in words of the world, for a model that knows no others: from the lowest to the highest of ten levels.
GOALS = tuple("cruel spiteful rude greedy lazy calm gentle clever kind graceful".split())
# Rewards that are the lowest and the highest level, or beyond; replies of the pretraining data lie around 1.5.
GOAL_RANGE = (-2.0, 5.0)


def goal_sentence(level: int) -> str:
    """The sentence that asks for a reply of this level, 1 to 10."""
    return f"It is {GOALS[level - 1]}."


def pretraining_rows(count: int, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Train prompts, each with one reply of any quality, as chat messages `prompt` and `completion`."""
    _check_rows("train", count, seed)
    return (_pretraining_row(seed, index) for index in range(count))


def _pretraining_row(seed: int, index: int) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(f"tiny_feedback/pretraining/{seed}/{index}")
    animal, place, style = _cell("train", seed, index)
    return {
        "prompt": _message("user", _prompt(animal, place, style)),
        "completion": _message("assistant", _reply(animal, place, rng)),
    }


def vocabulary() -> list[str]:
    """Every word and punctuation mark of prompts and replies, as written (so "It" and "it"), sorted."""
    fixed = " ".join((*_templates(), *(_prompt("", "", style) for style in STYLES)))
    words = set(re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", fixed)))
    return sorted(words.union(*SLOTS.values()))
