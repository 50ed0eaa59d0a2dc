"""Key phrases of a text (RAKE: Rose et al. 2010, "Automatic keyword extraction from individual documents"), and texts that lack some."""

from __future__ import annotations

import re
from collections import Counter

from prefopt.data.records import BadRow

STOP_WORDS = frozenset(
    "a about above after again all also am an and any anyone are as at be because been before behind being below beside between both but "
    "by can could did do does doing down during each either else every few for from further get had has have having he her here hers him "
    "his how i if in into is it its itself just let may me might more most much must my near no nor not now of off on once one only or "
    "other our out over own quite rather same shall she should so some such than that the their them then there these they this those "
    "though through to too under until up upon us very was we were what when where which while who whom whose why will with within "
    "without would yet you your yours".split()
)
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

Spans = list[tuple[int, int]]


def key_phrases(text: str, least: int = 1) -> dict[str, Spans]:
    """The key phrases of a text, in lower case, and where they stand, the weightiest first.

    A phrase is a run of words without stop words (English) and without punctuation between them. A word weighs its degree (words of the
    runs that it is in) over its frequency, a phrase the sum of its words; equal ones are in the order of the text. A text with fewer than
    `least` phrases gets its single content words instead, and failing that all of its words. Raises `BadRow` where even these are fewer.
    """
    words, runs = list(_WORD.finditer(text)), _runs(text)
    degree: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for run in runs:
        for word in run:
            degree[word[0].lower()] += len(run)
            count[word[0].lower()] += 1
    weight = {word: degree[word] / count[word] for word in count}
    for units in (runs, [[word] for run in runs for word in run], [[word] for word in words]):
        spans: dict[str, Spans] = {}
        scores: dict[str, float] = {}
        for unit in units:
            said = [word[0].lower() for word in unit]
            spans.setdefault(" ".join(said), []).append((unit[0].start(), unit[-1].end()))
            scores[" ".join(said)] = sum(weight.get(word, 0.0) for word in said)
        if len(spans) >= least:
            return {phrase: spans[phrase] for phrase in sorted(spans, key=lambda p: (-scores[p], spans[p][0]))}
    raise BadRow(f"a reply of {len(words)} words ({text[:40]!r}) has too few different ones to leave out {least - 1} shares of {least}")


def degraded(text: str, level: int, levels: int = 3) -> str:
    """The text without the weightiest level/levels of its key phrases, wherever they stand; a higher level lacks more and all that a lower
    one lacks. 0 < level < levels. Raises `BadRow` for a text of fewer than `levels` different words.
    """
    phrases = key_phrases(text, levels)
    gone = sorted(span for phrase in list(phrases)[: round(len(phrases) * level / levels)] for span in phrases[phrase])
    kept, end = "", 0
    for start, stop in gone:
        kept, end = kept + text[end:start], stop
    return _tidy(kept + text[end:])


def _runs(text: str) -> list[list[re.Match]]:
    runs: list[list[re.Match]] = [[]]
    end = 0
    for word in _WORD.finditer(text):
        stop = word[0].lower() in STOP_WORDS
        if stop or text[end : word.start()].strip(" \t"):
            runs.append([])
        if not stop:
            runs[-1].append(word)
        end = word.end()
    return [run for run in runs if run]


def _tidy(text: str) -> str:
    """No gaps where words have gone: one space between words, none before a punctuation mark, no comma after another mark."""
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" +(?=[,.;:!?])", "", text)
    return re.sub(r"([,.;:!?])[,;:]+", r"\1", text).strip()
