"""The kinds of data transforms: each takes a list of examples and gives another one. See `prefopt.data.transforms` for how they are used.

The settings of a kind are the keyword arguments of its function, and `rules` say which values they may have. Nothing random but from the
job's own generator; no example is changed in place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from filelock import FileLock

from prefopt.config.schema import DataConfig
from prefopt.data import tiny_feedback
from prefopt.data.records import Example, Message
from prefopt.data.rejection import rejection_sample
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from prefopt.paths import store_dir

Range = list  # [low, high]; null for an open end


@dataclass
class Tools:
    """What transforms need and `prefopt.data` does not make. None: not at hand, as in `prefopt plan`, which loads no model.

    reward: path of a reward model -> (examples -> the reward of each one's first completion), with an attribute `source` that tells it
    apart from others. similarity: name of a text encoder -> (pairs of texts -> the cosine similarity of each), with the same attribute.
    vectors: the same name -> (texts -> a tensor of a vector for each), with the same attribute.
    Neither loads its model before it is asked.
    """

    reward: Callable[[str], Callable[[Sequence[Example]], list[float]]] | None = None
    similarity: Callable[[str], Callable[[Sequence[tuple[str, str]]], list[float]]] | None = None
    vectors: Callable[[str], Callable[[Sequence[str]], Any]] | None = None


@dataclass
class Job:
    """What a transform may use beside its rows and settings."""

    name: str
    data: DataConfig
    rng: random.Random
    tools: Tools
    held_out: bool = False
    counts: Counter[str] = field(default_factory=Counter)  # what changed, in words

    def refuse(self, example: Example, reason: str) -> UserError:
        return UserError(f"{example.origin}: data.transforms.{self.name} {reason}")


@dataclass
class Kind:
    run: Callable[..., list[Example]]
    reads: tuple[str, ...]  # kinds of rows; empty: any
    held_out: bool  # held-out rows go through it as well
    needs_model: Callable[[dict[str, Any]], bool]
    rules: tuple[str, ...]


KINDS: dict[str, Kind] = {}


def never(settings: dict[str, Any]) -> bool:
    return False


def kind(
    *reads: str, rules: tuple[str, ...] = (), held_out: bool = False, needs_model: Callable[[dict[str, Any]], bool] = never
) -> Callable:
    def register(function: Callable[..., list[Example]]) -> Callable[..., list[Example]]:
        KINDS[function.__name__.rstrip("_")] = Kind(function, reads, held_out, needs_model, rules)
        return function

    return register


def gap_of(example: Example, job: Job) -> float:
    """Score of a pair's chosen reply minus that of its rejected one."""
    chosen, rejected = (c.score for c in example.completions)
    if chosen is None or rejected is None:
        raise job.refuse(example, "needs a score of both replies, and the row has none; name the columns in data.columns.chosen_score and "
                                  "rejected_score, or put the transform `score` before it (a reward model)")
    return chosen - rejected


def exchanged(example: Example) -> Example:
    """The pair with its replies in each other's place. The label speaks of whoever stands first, and so does the margin. Columns that name
    a side (chosen_x, rejected_x) change with it; what was written about the old preference is gone.
    """
    sides = {"chosen": "rejected", "rejected": "chosen"}
    of = {key: re.sub("chosen|rejected", lambda side: sides[side[0]], key) for key in example.meta}
    meta = {key: example.meta.get(of[key], value) for key, value in example.meta.items()}
    return replace(example, completions=example.completions[::-1], meta=meta, rationale="")


# ---- which rows, and which reply is preferred --------------------------------------------------------


@kind("pair")
def swap(rows: list[Example], job: Job) -> list[Example]:
    """Chosen and rejected change places: what was disliked is to be preferred, as in AlignDistil's reverse DPO (2503.02832)."""
    job.counts["exchanged"] += len(rows)
    return [exchanged(e) for e in rows]


@kind("ranking", rules=("anchor in ('best', 'each')", "order in ('gap', 'random')", "keep is None or keep >= 1", "min_gap >= 0"))
def pairs(
    rows: list[Example], job: Job, *, anchor: str = "best", order: str = "gap", keep: int | None = None, min_gap: float = 0.0
) -> list[Example]:
    """Pairs of a ranking's replies: the best with each other one (anchor=best), or every two (anchor=each); of these the first `keep`, the
    widest gap first (order=gap) or at random. Replies whose scores or texts are equal, or closer than `min_gap`, make no pair.
    """
    out = []
    for e in rows:
        replies = e.completions
        couples = [(a, b) for i, a in enumerate(replies) for b in replies[i + 1 :] if anchor == "each" or i == 0]
        couples = [(a, b) for a, b in couples if a.score - b.score >= min_gap and a.score > b.score and not a.same_as(b)]
        if order == "random":
            job.rng.shuffle(couples)
        else:
            couples.sort(key=lambda couple: couple[1].score - couple[0].score)
        job.counts["rankings without a pair"] += not couples
        for better, worse in couples[:keep]:  # what is told of the best reply speaks for its pairs only
            told = e.rationale if better is replies[0] else ""
            out.append(replace(e, kind="pair", completions=[better, worse], rationale=told))
    return out


@kind("ranking", rules=("keep >= 2", "beta >= 0"))
def reject(rows: list[Example], job: Job, *, keep: int = 8, beta: float = 0.5) -> list[Example]:
    """Of each scored pool the `keep` replies that statistical rejection sampling keeps (RSO, 2309.06657), as a smaller ranking.

    `beta` is in units of the score; 0 keeps the best ones.
    """
    out = []
    for e in rows:
        kept = rejection_sample([c.score for c in e.completions], keep, beta, job.rng)
        replies = [e.completions[i] for i in sorted(kept)]  # a ranking stands best first
        job.counts["replies left out"] += len(e.completions) - len(kept)
        if replies[0].score == replies[-1].score:
            job.counts["rankings whose kept replies have one score"] += 1
        else:
            out.append(replace(e, completions=replies))
    return out


@kind(rules=("gap is not None or score is not None or length_ratio is not None",))
def filter_(
    rows: list[Example], job: Job, *, gap: Range | None = None, score: Range | None = None, length_ratio: Range | None = None
) -> list[Example]:
    """Only rows within [low, high]: the gap of a pair's scores, the score of every reply, characters of chosen over rejected."""
    out = []
    for e in rows:
        if e.kind != "pair" and (gap or length_ratio):
            raise job.refuse(e, f"compares the sides of pairs, and this is a {e.kind} row; put the transform `pairs` before it")
        if score and any(c.score is None for c in e.completions):
            raise job.refuse(e, "needs a score of every reply, and the row has none; name the columns in data.columns")
        wrong = [
            what for what, bounds, values in (
                ("gap", gap, lambda: [gap_of(e, job)]), ("score", score, lambda: [c.score for c in e.completions]),
                ("length", length_ratio, lambda: [len(e.completions[0].text) / max(len(e.completions[1].text), 1)]),
            ) if bounds and not all(_within(v, bounds) for v in values())
        ]  # fmt: skip
        if wrong:
            job.counts[f"left out by {wrong[0]}"] += 1
        else:
            out.append(e)
    return out


def _within(value: float, bounds: Range) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)


@kind("pair")
def agree(
    rows: list[Example], job: Job, *, chosen: str = "fine_grain_score_chosen", rejected: str = "fine_grain_score_rejected"
) -> list[Example]:
    """Only pairs whose chosen reply is rated as high as the other one or higher in the columns `chosen` and `rejected`, which hold a number
    or a list of them, such as UltraFeedback's four ratings, of which the mean counts (RA-DPO, 2410.08067). Put it before `reward_augment`.
    """
    out = []
    for e in rows:
        ratings = [e.meta.get(column) for column in (chosen, rejected)]
        ratings = [r if isinstance(r, list) else [r] for r in ratings]
        if not all(r and all(isinstance(x, (int, float)) and math.isfinite(x) for x in r) for r in ratings):
            raise job.refuse(e, f"needs ratings, numbers or lists of them, in the columns {chosen} and {rejected}, and finds "
                                f"{e.meta.get(chosen)!r} and {e.meta.get(rejected)!r}; name the columns: data.transforms.{job.name}."
                                "chosen=...")
        means = [sum(r) / len(r) for r in ratings]
        job.counts["left out, for their ratings disagree"] += means[0] < means[1]
        out += [e] if means[0] >= means[1] else []
    return out


@kind("pair", rules=("part in ('easy', 'hard')", "(threshold is None) != (share is None)", "threshold is None or threshold >= 0",
                     "share is None or 0 < share < 1"))
def gap_split(rows: list[Example], job: Job, *, part: str, threshold: float | None = None, share: float | None = None) -> list[Example]:
    """The easy pairs, or the hard ones, which are all others (MPO, 2403.19443). Easy are those whose scores differ by `threshold` or more;
    or, where the scale of the scores is not known beforehand, this `share` of the pairs, those that differ most.
    """
    gaps = [abs(gap_of(e, job)) for e in rows]
    if share is not None:
        threshold = sorted(gaps)[len(gaps) - max(1, round(share * len(gaps)))]
    easy = [gap >= threshold for gap in gaps]
    job.counts["easy"] += sum(easy)
    job.counts["hard"] += len(rows) - sum(easy)
    return [e for e, is_easy in zip(rows, easy, strict=True) if is_easy == (part == "easy")]


@kind("pair", rules=("0 < share <= 1",))
def experts(rows: list[Example], job: Job, *, share: float = 0.1) -> list[Example]:
    """This `share` of the pairs, those whose chosen sides score highest: what deserves to be imitated (Diffusion-DRO, 2510.18353)."""
    for e in rows:
        gap_of(e, job)  # refuses a row without scores
    kept = sorted(range(len(rows)), key=lambda i: -rows[i].completions[0].score)[: max(1, round(share * len(rows)))]
    job.counts["left out, for others score higher"] += len(rows) - len(kept)
    return [rows[i] for i in sorted(kept)]


@kind(rules=("share is None or 0 < share < 1", "count is None or count >= 1", "share is None or count is None"))
def mix(rows: list[Example], job: Job, *, path: str, share: float | None = None, count: int | None = None) -> list[Example]:
    """Rows of another file, folder or glob with the same columns: so many that they are this `share` of all rows, or `count`, or all."""
    other = replace(job.data, source="files", path=path, train=None, eval=None, rows=None, limit=None, eval_fraction=0.0, label_noise=0.0,
                    length_bias=0.0, completions=None, transforms={})  # fmt: skip
    found = load_data(other)[0]
    job.counts["bad rows left out"] += len(found.rejected)
    wanted = round(share / (1 - share) * len(rows)) if share else count or len(found.examples)
    if wanted > len(found.examples):
        raise UserError(f"data.transforms.{job.name}: {wanted} rows are asked for, and {path} has {len(found.examples)} usable ones; lower "
                        "share or count")
    chosen = sorted(job.rng.sample(range(len(found.examples)), wanted))
    job.counts[f"from {path}"] += wanted
    return rows + [found.examples[i] for i in chosen]


@kind("pair", rules=("stages >= 1", "by in ('prompt', 'data')"))
def curriculum(rows: list[Example], job: Job, *, stages: int = 3, by: str = "prompt") -> list[Example]:
    """Puts each pair into a stage, easy ones (a wide gap) first (Curry-DPO, 2403.07230): by its place among its prompt's pairs (by=prompt),
    of which three give one to each of three stages, or among all pairs (by=data). source=offline goes through the stages.
    """
    groups: dict[str, list[int]] = {}
    for i, e in enumerate(rows):
        groups.setdefault(e.prompt_text if by == "prompt" else "", []).append(i)
    stage = {}
    for members in groups.values():
        members.sort(key=lambda i: -gap_of(rows[i], job))
        stage |= {i: place * stages // max(len(members), stages) for place, i in enumerate(members)}
    for i in range(stages):
        job.counts[f"in stage {i + 1}"] += sum(s == i for s in stage.values())
    return [replace(e, stage=stage[i]) for i, e in enumerate(rows)]


# ---- what is known about them -------------------------------------------------------------------------


@kind("pair", "ranking", held_out=True, needs_model=lambda settings: True)
def score(rows: list[Example], job: Job, *, path: str) -> list[Example]:
    """Every reply's score by a reward model: the run of algo=reward_bt at `path`, or any model that reward.path takes. Kept on disk.

    Pairs keep their order, a ranking is sorted anew.
    """
    single = [replace(e, completions=[c], kind="demonstration") for e in rows for c in e.completions]
    try:
        reward = job.tools.reward(path)
        texts = [[[m.plain() for m in e.bare or e.prompt], [m.plain() for m in e.completions[0].messages]] for e in single]
        scores = iter(cached("scores", getattr(reward, "source", path), texts, lambda: reward(single)))
    except UserError as error:
        raise UserError(f"data.transforms.{job.name}: {error}") from error
    out = []
    for e in rows:
        completions = [replace(c, score=next(scores)) for c in e.completions]
        if e.kind == "ranking":
            completions.sort(key=lambda c: -c.score)
        else:
            job.counts["pairs where the model prefers the rejected reply"] += completions[0].score < completions[1].score
        told = e.rationale if completions[0].same_as(e.completions[0]) else ""
        out.append(replace(e, completions=completions, rationale=told))
    return out


@kind("pair", held_out=True)
def margin(rows: list[Example], job: Job, *, scale: float = 1.0) -> list[Example]:
    """Each pair's margin: `scale` times the gap of its scores, negative where the rejected reply has the higher one."""
    return [replace(e, margin=scale * gap_of(e, job)) for e in rows]


@kind("pair", rules=("tau is None or tau > 0",))
def soft_labels(rows: list[Example], job: Job, *, tau: float | None = 1.0) -> list[Example]:
    """Each pair's label: sigmoid(gap / tau), the probability that its chosen reply is better if scores are Bradley-Terry's. Without a `tau`
    scores are scaled to [0, 1] first, over all rows (SmPO, 2506.02698): labels then lie between 0.27 and 0.73.
    """
    gaps = [gap_of(e, job) for e in rows]
    if tau is None:
        scores = [c.score for e in rows for c in e.completions]
        tau = max(scores, default=1.0) - min(scores, default=0.0)
        if tau == 0:
            raise UserError(f"data.transforms.{job.name}: all scores are {scores[0]:g}, which says nothing of who wins; set tau")
        job.counts[f"labelled by scores from {min(scores, default=0.0):g} to {max(scores, default=1.0):g}"] += len(rows)
    return [replace(e, label=(1 + math.tanh(gap / (2 * tau))) / 2) for e, gap in zip(rows, gaps, strict=True)]


@kind("pair", "ranking")
def unary(rows: list[Example], job: Job, *, threshold: float = 0.0) -> list[Example]:
    """Each reply as a row of its own, desirable if its score is above `threshold`: thumbs up and down for KTO and its kin."""
    out = []
    for e in rows:
        for c in e.completions:
            if c.score is None:
                raise job.refuse(e, "needs a score of every reply, and the row has none; name the columns in data.columns")
            job.counts["desirable" if c.score > threshold else "undesirable"] += 1
            out.append(replace(e, kind="unary", completions=[replace(c, desirable=c.score > threshold)], label=1.0, margin=0.0))
    return out


@kind("pair")
def factuality(
    rows: list[Example], job: Job, *, chosen: str = "chosen_hallucinated", rejected: str = "rejected_hallucinated"
) -> list[Example]:
    """F-DPO (2601.03027): the columns hold 1 where a reply is hallucinated, else 0. Where chosen is and rejected is not, they change
    places; then margin = rejected - chosen, which is 1 where only the rejected reply is hallucinated, and 0 elsewhere.
    """
    out = []
    for e in rows:
        flags = [e.meta.get(column) for column in (chosen, rejected)]
        if any(flag not in (0, 1) for flag in flags):
            raise job.refuse(e, f"needs 0 or 1 in the columns {chosen} and {rejected}, and finds {flags[0]!r} and {flags[1]!r}; let a "
                                f"judge label the replies, or name other columns: data.transforms.{job.name}.chosen=...")
        if flags == [1, 0]:
            e, flags = exchanged(e), [0, 1]
            job.counts["exchanged"] += 1
        job.counts["with a margin"] += flags == [0, 1]
        out.append(replace(e, margin=float(flags[1] - flags[0]), meta={**e.meta, chosen: flags[0], rejected: flags[1]}))
    return out


@kind("pair", rules=("alpha >= 0",), needs_model=lambda settings: bool(settings.get("encoder")))
def similarity_weight(rows: list[Example], job: Job, *, alpha: float = 1.0, encoder: str | None = None) -> list[Example]:
    """Multiplies a pair's weight by exp(-alpha d), d = 1 - cosine similarity of prompt and chosen reply (Sem-DPO, 2507.20133): by their
    words, or under the transformers text encoder (folder or hub id) `encoder`.
    """
    texts = [(e.prompt_text, e.completions[0].text) for e in rows]
    if encoder:
        try:
            similarity = job.tools.similarity(encoder)
            said = cached("similarity", getattr(similarity, "source", encoder), texts,
                          lambda: {"cosines": similarity(texts), "cut": getattr(similarity, "cut", 0)})
        except UserError as error:
            raise UserError(f"data.transforms.{job.name}.encoder={encoder}: {error}") from error
        cosines = said["cosines"]
        job.counts["texts cut to the encoder's context"] += said["cut"]
    else:
        cosines = [cosine(a, b) for a, b in texts]
    # A rounded cosine must not make a text differ from itself.
    cosines = [1.0 if a == b else c for (a, b), c in zip(texts, cosines, strict=True)]
    weights = [math.exp(-alpha * (1 - c)) for c in cosines]
    job.counts["weights below a half"] += sum(w < 0.5 for w in weights)
    return [replace(e, weight=e.weight * w) for e, w in zip(rows, weights, strict=True)]


@kind("unary", rules=("sample >= 1", "None not in clip and 0 < clip[0] <= clip[1]"),
      needs_model=lambda settings: bool(settings.get("encoder")))
def density_ratio(
    rows: list[Example], job: Job, *, encoder: str | None = None, sample: int = 1024, clip: Range = (0.5, 10.0)
) -> list[Example]:
    """Multiplies an undesirable row's weight by p(x | desirable) / p(x | undesirable) of its prompt x, within `clip` (BCO, 2404.04656), so
    that both kinds of rows speak of the same prompts: by logistic regression, fitted to `sample` rows of each kind, on the words of prompts
    or on their vectors under the transformers text encoder (folder or hub id) `encoder`.
    """
    from prefopt.data.density_ratio import bags_of_words, clipped_ratio, log_density_ratios  # torch, which listing kinds does without

    desirable = [bool(e.completions[0].desirable) for e in rows]
    kinds = [[i for i, good in enumerate(desirable) if good is which] for which in (True, False)]
    if not all(kinds):
        raise job.refuse(rows[0], f"compares the prompts of desirable and of undesirable rows, and all {len(rows)} rows are "
                                  f"{'desirable' if kinds[0] else 'undesirable'}; leave it out: transforms=none")
    fitted = [i for members in kinds for i in sorted(job.rng.sample(members, min(sample, len(members))))]
    texts = [e.prompt_text for e in rows]
    if encoder:
        try:
            vectors = job.tools.vectors(encoder)
            ratios = cached("density_ratio", getattr(vectors, "source", encoder), [texts, desirable, fitted],
                            lambda: log_density_ratios(vectors(texts), desirable, fitted))
        except UserError as error:
            raise UserError(f"data.transforms.{job.name}.encoder={encoder}: {error}") from error
    else:
        ratios = log_density_ratios(bags_of_words(texts), desirable, fitted)
    weights = [1.0 if good else clipped_ratio(r, *clip) for good, r in zip(desirable, ratios, strict=True)]
    job.counts["undesirable rows that weigh less"] += sum(w < 1 for w in weights)
    job.counts["undesirable rows that weigh more"] += sum(w > 1 for w in weights)
    return [replace(e, weight=e.weight * w) for e, w in zip(rows, weights, strict=True)]


def cosine(a: str, b: str) -> float:
    """Cosine similarity of two texts as bags of words, case left aside: 1 for the same words, 0 where none is shared or a text is empty."""
    x, y = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    sizes = math.sqrt(sum(n * n for n in x.values()) * sum(n * n for n in y.values()))
    return sum(n * y[word] for word, n in x.items()) / sizes if sizes else 0.0


GOAL = "Give an answer that is worth {goal} on a scale from 1 to {top}. Do not mention this."


@kind(held_out=True, rules=("placement in ('system', 'user')", "top > 1", "template is None or '{goal}' in template",
                             "span is None or (None not in span and span[0] < span[1])"))
def reward_augment(
    rows: list[Example], job: Job, *, template: str | None = None, placement: str = "system", span: Range | None = None, top: float = 10.0
) -> list[Example]:
    """RA-DPO (2410.08067): the prompt asks for a reply of a certain score, and every pair is used twice. Asked for the score of the
    chosen reply, that one is preferred; asked for that of the rejected reply, the rejected one. Held-out prompts ask for `top`.

    The `span` [low, high] of the scores is mapped to whole numbers from 1 to `top`; null: scores are on that scale. `template` holds {goal}
    and may hold {top}; on tiny-feedback both are the world's own (its model knows no numbers). Rewards and judges see the bare prompt.
    """
    own = job.data.source == "tiny_feedback" and template is None
    if own:
        span, top = span or list(tiny_feedback.GOAL_RANGE), float(len(tiny_feedback.GOALS))

    def ask(e: Example, value: float) -> Example:
        text = (template or GOAL).replace("{goal}", f"{value:.4g}").replace("{top}", f"{top:.4g}")
        text = tiny_feedback.goal_sentence(round(value)) if own else text
        return replace(e, prompt=_with_goal(e.prompt, text, placement), bare=e.bare or e.prompt)

    if job.held_out:
        return [ask(e, top) for e in rows]
    out = []
    for e in rows:
        if e.kind != "pair":
            raise job.refuse(e, f"reads pairs, and this is a {e.kind} row")
        gap_of(e, job)  # refuses rows without scores
        goals = [_level(c.score, span, top) for c in e.completions]
        job.counts["rows whose two goals are equal"] += goals[0] == goals[1]
        out += [ask(e, goals[0]), ask(exchanged(e), goals[1])]
    return out


def _level(score: float, span: Range | None, top: float) -> float:
    """A score on the scale from 1 to `top`."""
    if span is None:
        return score
    low, high = span
    return min(max(round(1 + (score - low) / (high - low) * (top - 1)), 1), round(top))


def _with_goal(prompt: list[Message], goal: str, placement: str) -> list[Message]:
    """The prompt with a sentence in front of its system message (which it gets if it has none), or of its last user's turn."""
    at = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i].role == placement), None)
    if at is None:
        return [_said(placement, goal), *prompt]
    return [*prompt[:at], _said(placement, f"{goal}\n\n{prompt[at].text}"), *prompt[at + 1 :]]


def _said(role: str, text: str) -> Message:
    return Message(role, [{"type": "text", "text": text}])


# ---- what a model said, once --------------------------------------------------------------------------


def cached(what: str, source: Any, texts: Sequence[Any], compute: Callable[[], Any]) -> Any:
    """`compute()`, plain data that says something of each text, kept on disk under a hash of who is asked and of all texts.

    Of several processes that want it at once, one computes and the others wait for its file: a collective would wait a few minutes only.
    """
    about = {key: value for key, value in source.items() if key != "path"} if isinstance(source, dict) else source
    digest = hashlib.sha256(json.dumps([about, texts], sort_keys=True, default=str).encode()).hexdigest()
    path = store_dir() / what / f"{digest}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                part = path.with_name(f".{path.name}.{os.getpid()}.part")
                part.write_text(json.dumps(compute()), encoding="utf-8")
                part.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))
