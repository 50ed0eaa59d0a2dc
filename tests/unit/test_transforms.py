"""Data transforms: what each kind makes of rows, what is refused, and how they are counted, shown and applied."""

from __future__ import annotations

import inspect
import json
import math
import random
import threading
from collections import Counter
from itertools import pairwise

import pytest

from prefopt.config.catalogue import groups, load_yaml
from prefopt.config.schema import DataCheckConfig, DataConfig
from prefopt.data import tiny_feedback
from prefopt.data.records import Example, parse_row
from prefopt.data.rejection import acceptance, rejection_sample
from prefopt.data.sources import Split, load_data
from prefopt.data.transform_kinds import KINDS, cached, cosine
from prefopt.data.transforms import Tools, apply_transforms, check_transforms, transform_lines
from prefopt.errors import UserError
from prefopt.evaluation.data_check import check_text
from tests.toy import COLUMNS, data_config, model_config, save_model


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))


def pair(number: int = 1, scores: tuple = (), **columns) -> Example:
    row = {"prompt": f"question {number}", "chosen": f"good answer {number}", "rejected": f"bad {number}", **columns}
    row |= dict(zip(("chosen_score", "rejected_score"), scores, strict=False))
    return parse_row(row, COLUMNS, f"row {number}")


def ranking(scores: list[float], number: int = 1) -> Example:
    row = {"prompt": f"question {number}", "completions": [f"reply {number} {i}" for i in range(len(scores))], "scores": scores}
    return parse_row(row, COLUMNS, f"row {number}")


NO_MODELS = Tools()


def run(rows: list[Example], transforms: dict, tools: Tools | None = NO_MODELS, seed: int = 0, split: str = "train", **data) -> Split:
    """A split after `transforms`."""
    made = Split(split, list(rows))
    apply_transforms([made], data_config(transforms=transforms, **data), seed, tools)
    return made


def refused(rows: list[Example], transforms: dict, **settings) -> str:
    with pytest.raises(UserError) as caught:
        run(rows, transforms, **settings)
    return str(caught.value)


def gap(e: Example) -> float:
    return e.completions[0].score - e.completions[1].score


# ---- one by one ------------------------------------------------------------------------------------------------------


def test_swap_exchanges_the_replies_and_what_is_known_of_them():
    e = pair(scores=(7, 3), label=0.8, margin=2.0, chosen_words=4, rejected_words=1, source="x", rationale="because")
    (swapped,) = run([e], {"swap": None}).examples
    assert [c.text for c in swapped.completions] == ["bad 1", "good answer 1"] and gap(swapped) == -4
    assert (swapped.label, swapped.margin) == (0.8, 2.0)  # of whoever is preferred: the opposite taste, as sure of itself
    assert swapped.meta == {"chosen_words": 1, "rejected_words": 4, "source": "x"} and not swapped.rationale
    assert e.completions[0].text == "good answer 1"  # nothing is changed in place
    twice = run([e], {"swap": {}, "again": {"kind": "swap"}}).examples[0]
    assert (twice.completions, twice.meta, twice.label) == (e.completions, e.meta, e.label)


def test_pairs_of_the_best_and_of_each():
    rows = [ranking([4, 1, 3, 2]), ranking([0, 5, 5, 1], 2)]
    best = run(rows, {"pairs": {}}).examples
    assert [gap(e) for e in best] == [3, 2, 1, 5, 4]  # one less than there are replies; two equal scores make no pair
    assert {e.kind for e in best} == {"pair"} and {e.label for e in best} == {1.0}
    assert len(run(rows[:1], {"pairs": {"anchor": "each"}}).examples) == 6
    assert [gap(e) for e in run(rows, {"pairs": {"keep": 1}}).examples] == [3, 5]
    assert [gap(e) for e in run(rows, {"pairs": {"min_gap": 2}}).examples] == [3, 2, 5, 4]
    same = parse_row({"prompt": "q", "completions": ["a", "b", "a"], "scores": [3, 2, 1]}, COLUMNS)
    assert [gap(e) for e in run([same], {"pairs": {}}).examples] == [1]


def test_random_pairs_follow_from_the_seed():
    row, settings = ranking(list(range(8))), {"pairs": {"anchor": "each", "order": "random", "keep": 4}}
    texts = lambda seed: [[c.text for c in e.completions] for e in run([row], settings, seed=seed).examples]  # noqa: E731
    assert texts(0) == texts(0) != texts(1)
    assert all(gap(e) > 0 for e in run([row], settings).examples)


def test_filter_keeps_what_is_within_all_ranges():
    rows = [pair(i, scores) for i, scores in enumerate([(5, 4), (5, 1), (2, 3), (9, 8)])]
    left = lambda **settings: [int(e.origin[4:]) for e in run(rows, {"filter": settings}).examples]  # noqa: E731
    assert left(gap=[0, None]) == [0, 1, 3] and left(gap=[None, 1]) == [0, 2, 3] and left(gap=[1, 1]) == [0, 3]
    assert left(score=[2, 8]) == [0, 2] and left(gap=[0, None], score=[None, 5]) == [0, 1]
    assert left(length_ratio=[2, 3]) == [0, 1, 2, 3] and "leaves none of 4" in refused(rows, {"filter": {"length_ratio": [9, None]}})
    assert run(rows, {"filter": {"gap": [0, 2]}}).transforms[0]["changed"] == {"left out by gap": 2}


def test_pairs_are_left_out_whose_ratings_disagree():
    """The mean of a list counts; equal means agree; and the copies that reward_augment makes of the others stay."""
    rated = [([4, 2], [1, 5]), ([4, 4, 1], 2.5), (1, 2), ([5, 1, 1], [3])]
    rows = [pair(i, (7, 3), fine_grain_score_chosen=w, fine_grain_score_rejected=r) for i, (w, r) in enumerate(rated)]
    made = run(rows, {"agree": {}})
    assert [e.origin for e in made.examples] == ["row 0", "row 1"]
    assert transform_lines(made) == [("agree", "4 rows -> 2; 2 left out, for their ratings disagree")]
    assert len(run(rows, {"agree": None, "reward_augment": {}}).examples) == 4
    assert len(run(rows, {"agree": {"chosen": "fine_grain_score_rejected", "rejected": "fine_grain_score_chosen"}}).examples) == 3
    assert "finds 5 and None; name the columns: data.transforms.agree" in refused([pair(fine_grain_score_chosen=5)], {"agree": {}})
    assert "finds [5, 'N/A'] and 1" in refused([pair(fine_grain_score_chosen=[5, "N/A"], fine_grain_score_rejected=1)], {"agree": {}})


@pytest.mark.parametrize("threshold", [0, 1, 2.5, 100])
def test_easy_and_hard_pairs_are_a_partition(threshold):
    rows = [pair(i, (random.Random(i).uniform(0, 5), 2.5)) for i in range(40)] + [pair(40, (1, 1))]
    parts = {}
    for part in ("easy", "hard"):
        try:
            parts[part] = run(rows, {"gap_split": {"part": part, "share": None, "threshold": threshold}}).examples
        except UserError:  # nothing left
            parts[part] = []
    assert sorted(e.origin for part in parts.values() for e in part) == sorted(e.origin for e in rows)
    assert len(parts["easy"]) == sum(abs(gap(e)) >= threshold for e in rows)
    assert {0: len(parts["hard"]), 100: len(parts["easy"])}.get(threshold, 0) == 0


def test_a_share_of_the_pairs_is_easy():
    rows = [pair(i, (i, 0)) for i in (4, 9, 2, 7, 5)] + [pair(8, (0, 8))]
    easy, hard = (run(rows, {"gap_split": {"part": part, "share": 0.5}}).examples for part in ("easy", "hard"))
    assert [abs(gap(e)) for e in easy] == [9, 7, 8] and [gap(e) for e in hard] == [4, 2, 5]


def test_mix_takes_a_share_or_a_count_of_another_file(tmp_path):
    other = tmp_path / "more.jsonl"
    lines = [json.dumps({"prompt": f"other {i}", "chosen": "yes", "rejected": "no"}) for i in range(20)]
    other.write_text("\n".join([*lines, "{oops"]))
    rows = [pair(i) for i in range(30)]
    mixed = lambda **s: run(rows, {"mix": {"path": str(other), **s}}, on_bad_row="skip")  # noqa: E731
    assert len(mixed().examples) == 50 and len(mixed(count=7).examples) == 37
    share = mixed(share=0.25)
    assert len(share.examples) == 40 and share.examples[:30] == rows
    assert share.transforms[0]["changed"] == {"bad rows left out": 1, f"from {other}": 10}
    ties = [json.dumps({"prompt": f"tie {i}", "completions": ["yes", "no"], "scores": [1, 1]}) for i in range(3)]
    other.write_text("\n".join([*lines, *ties]))
    assert mixed().transforms[0]["changed"] == {"bad rows left out": 3, f"from {other}": 20}, "ties are counted with them"
    other.write_text("\n".join([*lines, "{oops"]))
    assert "45 rows are asked for, and" in refused(rows, {"mix": {"path": str(other), "share": 0.6}}, on_bad_row="skip")
    assert "malformed JSON" in refused(rows, {"mix": {"path": str(other)}})


def test_a_curriculum_goes_from_wide_to_narrow_gaps():
    rows = [ranking(random.Random(i).sample(range(50), 4), i) for i in range(30)]
    made = run(rows, {"pairs": {}, "curriculum": {}})
    assert made.transforms[1]["changed"] == {f"in stage {s}": 30 for s in (1, 2, 3)}
    for row in rows:
        gaps = [gap(e) for e in sorted((e for e in made.examples if e.origin == row.origin), key=lambda e: e.stage)]
        assert gaps == sorted(gaps, reverse=True) and len(gaps) == 3
    whole = run(rows, {"pairs": {}, "curriculum": {"by": "data", "stages": 4}}).examples
    ends = [[gap(e) for e in whole if e.stage == s] for s in range(4)]
    assert all(min(a) >= max(b) for a, b in pairwise(ends)) and {len(e) for e in ends} <= {22, 23}
    few = run([ranking([3, 1])], {"pairs": {}, "curriculum": {}}).examples
    assert [e.stage for e in few] == [0]
    apart = run([ranking([3, 1], 7), ranking([9, 1], 7)], {"pairs": {}, "curriculum": {}}).examples
    assert {gap(e): e.stage for e in apart} == {8: 0, 2: 1}, "pairs of one prompt, in two rows"


def test_one_pair_and_one_stage_is_best_against_worst():
    rows = [ranking([1, 4, 2], 1), ranking([9, 3, 5], 2)]
    plain = [[row.completions[0].text, row.completions[-1].text] for row in rows]
    made = run(rows, {"pairs": {"keep": 1}, "curriculum": {"stages": 1}}).examples
    assert [[c.text for c in e.completions] for e in made] == plain and {e.stage for e in made} == {0}


class Judge:
    """A reward that counts what it is asked."""

    def __init__(self, name: str, reward):
        self.source, self.reward, self.asked = {"path": f"runs/{name}", "fingerprint": name}, reward, 0

    def __call__(self, examples):
        assert all(len(e.completions) == 1 for e in examples)
        self.asked += len(examples)
        return [self.reward(e) for e in examples]


def test_scores_are_asked_once_and_kept():
    judge, other = Judge("a", lambda e: float(len(e.completions[0].text))), Judge("b", lambda e: -float(len(e.completions[0].text)))
    tools = Tools(reward={"runs/a": judge, "moved/a": judge, "runs/b": other}.__getitem__)
    rows = [pair(i) for i in range(5)]
    first = run(rows, {"score": {"path": "runs/a"}, "margin": {"scale": 0.5}}, tools).examples
    assert judge.asked == 10 and [e.margin for e in first] == [0.5 * (len("good answer 1") - len("bad 1"))] * 5
    assert run(rows, {"score": {"path": "moved/a"}}, tools).examples[0].completions == first[0].completions
    assert judge.asked == 10  # the same model and the same texts
    against = run(rows, {"score": {"path": "runs/b"}}, tools)
    assert other.asked == 10 and gap(against.examples[0]) < 0 and against.transforms[0]["changed"] == {
        "pairs where the model prefers the rejected reply": 5}
    run([*rows, pair(9)], {"score": {"path": "runs/a"}}, tools)
    assert judge.asked == 22  # other texts
    long = parse_row({"prompt": "q", "completions": ["a", "bbb", "cc"], "scores": [3, 2, 1]}, COLUMNS)
    assert [c.text for c in run([long], {"score": {"path": "runs/a"}}, tools).examples[0].completions] == ["bbb", "cc", "a"]


def test_of_several_that_want_an_answer_one_computes_it():
    begun, asked, found = threading.Barrier(4), [], []

    def compute():
        asked.append(1)
        return [0.5]

    def want():
        begun.wait(60)
        found.append(cached("scores", "m", ["text"], compute))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[0.5]] * 4 and asked == [1]


def test_without_models_the_rest_is_left_out_and_said():
    made = run([pair(scores=(3, 1))], {"swap": {}, "score": {}, "margin": {}}, tools=None)
    assert len(made.transforms) == 2 and made.examples[0].margin == 0
    assert transform_lines(made)[1] == ("score", "not applied, nor are those after it: it needs a model, which this command does not load")


def test_labels_from_scores():
    rows = [pair(1, (3, 1)), pair(2, (-1e4, 1e4)), pair(3, (2, 2))]
    labels = [e.label for e in run(rows, {"soft_labels": {"tau": 2}}).examples]
    assert labels == pytest.approx([1 / (1 + math.exp(-1)), 0, 0.5], abs=1e-12)
    made = run(rows[:1], {"unary": {"threshold": 2}})
    assert [(e.kind, e.completions[0].text, e.completions[0].desirable) for e in made.examples] == [
        ("unary", "good answer 1", True), ("unary", "bad 1", False)]
    assert made.transforms[0]["changed"] == {"desirable": 1, "undesirable": 1}


def flags(e: Example) -> tuple[int, int]:
    return e.meta["chosen_hallucinated"], e.meta["rejected_hallucinated"]


def test_the_factual_reply_is_chosen():
    labels = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = [pair(i, (5, 1), chosen_hallucinated=w, rejected_hallucinated=r) for i, (w, r) in enumerate(labels)]
    made = run(rows, {"factuality": None})
    assert [flags(e) for e in made.examples] == [(0, 0), (0, 1), (0, 1), (1, 1)]
    assert [e.margin for e in made.examples] == [0, 1, 1, 0]
    assert made.examples[2].completions[0].text == "bad 2" and gap(made.examples[2]) == -4
    assert made.transforms[0]["changed"] == {"exchanged": 1, "with a margin": 2}
    again = run(made.examples, {"factuality": None})
    assert again.examples == made.examples and again.transforms[0]["changed"] == {"with a margin": 2}
    own = [pair(1, h_w=1, h_l=0)]
    (e,) = run(own, {"factuality": {"chosen": "h_w", "rejected": "h_l"}}).examples
    assert e.meta == {"h_w": 0, "h_l": 1} and e.margin == 1 and e.completions[0].text == "bad 1"
    assert "needs 0 or 1 in the columns chosen_hallucinated and rejected_hallucinated, and finds None" in refused(own, {"factuality": {}})


def test_similarity_weights():
    same = pair(1, chosen="Question 1, question", prompt="question question 1")
    for alpha in (0, 1, 50):
        assert run([same], {"similarity_weight": {"alpha": alpha}}).examples[0].weight == 1
    rows = [pair(1, chosen="a question", weight=0.5), pair(2, chosen="else")]
    assert [e.weight for e in run(rows, {"similarity_weight": {"alpha": 0}}).examples] == [0.5, 1]
    near, far = (e.weight for e in run(rows, {"similarity_weight": {"alpha": 2}}).examples)
    assert near == pytest.approx(0.5 * math.exp(-2 * (1 - 0.5))) and far == pytest.approx(math.exp(-2))
    assert cosine("", "x") == 0 and cosine("The fox the", "fox THE the.") == 1

    asked = []

    def encoder(pairs):
        asked.append(("clip", len(pairs)))
        encoder.cut = 1
        return [0.7] * len(pairs)

    for _ in range(2):
        made = run(rows[1:], {"similarity_weight": {"alpha": 2, "encoder": "clip"}}, Tools(similarity={"clip": encoder}.get))
        assert made.transforms[0]["changed"]["texts cut to the encoder's context"] == 1
        assert made.examples[0].weight == pytest.approx(0.548812, abs=1e-6)
    assert asked == [("clip", 1)]  # the second time it was on disk


def texts(e: Example) -> list[tuple[str, str]]:
    return [(m.role, m.text) for m in e.prompt]


def test_reward_augmentation_uses_each_pair_twice():
    rows = [pair(1, (9, 4.5)), pair(2, (6, 6))]
    made = run(rows, {"reward_augment": {"template": "worth {goal} of {top}"}})
    assert len(made.examples) == 4 and made.transforms[0]["changed"] == {"rows whose two goals are equal": 1}
    one, two, three, four = made.examples
    assert texts(one) == [("system", "worth 9 of 10"), ("user", "question 1")]
    assert texts(two) == [("system", "worth 4.5 of 10"), ("user", "question 1")]
    assert [c.text for c in two.completions] == [c.text for c in reversed(one.completions)] == ["bad 1", "good answer 1"]
    assert one.prompt_text == two.prompt_text == "question 1"  # what rewards and comparisons see
    assert texts(three) == texts(four) and three.completions == four.completions[::-1]
    assert texts(rows[0]) == [("user", "question 1")]


def test_where_and_how_a_goal_is_asked_for():
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And now?"}]
    rows = [pair(1, (0.9, -3), prompt=talk)]
    ask = lambda **s: texts(run(rows, {"reward_augment": {"template": "{goal}!", **s}}).examples[0])  # noqa: E731
    assert ask() == [("system", "0.9!\n\nBe brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And now?")]
    assert ask(placement="user") == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "0.9!\n\nAnd now?")]
    span = run(rows, {"reward_augment": {"template": "{goal}!", "span": [-1, 1], "placement": "user"}}).examples
    assert [texts(e)[-1][1] for e in span] == ["10!\n\nAnd now?", "1!\n\nAnd now?"]  # 9.55 is rounded, -3 is below the span
    held_out = run(rows, {"reward_augment": {"template": "{goal}!"}, "swap": {}}, split="eval")
    assert texts(held_out.examples[0])[0] == ("system", "10!\n\nBe brief.") and held_out.examples[0].completions == rows[0].completions
    assert [t["name"] for t in held_out.transforms] == ["reward_augment"]  # swap is for training rows
    assert "worth 0.9 on a scale from 1 to 10" in texts(run(rows, {"reward_augment": {}}).examples[0])[0][1]


def test_goals_of_the_tiny_world_are_words_that_its_model_knows():
    known, cfg = set(tiny_feedback.vocabulary()), DataConfig(name="tiny-feedback", source="tiny_feedback", limit=300, eval_limit=5)
    cfg.columns.chosen_score, cfg.columns.rejected_score = "chosen_reward", "rejected_reward"
    cfg.transforms = {"reward_augment": {}}
    train, held_out = splits = load_data(cfg)
    before = [e.prompt_text for e in train.examples]
    apply_transforms(splits, cfg, 0)
    asked = Counter(texts(e)[0][1] for e in train.examples)
    assert len(train.examples) == 600 and len(asked) == len(set(tiny_feedback.GOALS)) == 10
    assert min(asked.values()) >= 3 and train.transforms[0]["changed"]["rows whose two goals are equal"] < 100
    assert {word for text in asked for word in text.replace(".", " .").split()} <= known
    assert {texts(e)[0][1] for e in held_out.examples} == {"It is graceful."}
    assert [e.prompt_text for e in train.examples[::2]] == before
    e = train.examples[0]
    assert tiny_feedback.true_reward("\n".join(m.text for m in e.prompt), e.completions[0].text) == e.completions[0].score


def test_rejected_pools_become_random_pairs():
    rows = [ranking([random.Random(f"{i} {j}").gauss(0, 1) for j in range(16)], i) for i in range(50)]
    made = run(rows, {"reject": {"keep": 4, "beta": 0.5}, "pairs": {"anchor": "each", "order": "random", "keep": 2}})
    assert len(made.examples) == 100 and made.transforms[0]["changed"] == {"replies left out": 50 * 12}
    average = lambda rows: sum(c.score for e in rows for c in e.completions) / sum(len(e.completions) for e in rows)  # noqa: E731
    assert average(made.examples) > average(rows) + 0.5
    best = run(rows, {"reject": {"keep": 3, "beta": 0}}).examples
    assert [e.completions for e in best] == [e.completions[:3] for e in rows]


# ---- rejection sampling ----------------------------------------------------------------------------------------------


def test_acceptance():
    assert acceptance(1, 2, 0.5) == pytest.approx(0.135335, abs=1e-6)
    assert acceptance(2, 2, 0.5) == 1 and acceptance(1, 2, 0) == 0 and acceptance(-1e9, 0, 1e-3) == 0 and acceptance(1, 2, math.inf) == 1


def test_what_is_kept_is_drawn_from_the_tilted_policy():
    """pi* proportional to pi exp(r / beta), for large pools."""
    pi, reward, beta, rng = [0.3, 0.3, 0.2, 0.15, 0.05], [0.0, 0.4, 0.8, 1.2, 1.6], 0.5, random.Random(0)
    target = [p * math.exp(r / beta) for p, r in zip(pi, reward, strict=True)]
    counts, draws = Counter(), 100_000
    for _ in range(draws):
        pool = rng.choices(range(5), pi, k=16)
        counts[pool[rejection_sample([reward[y] for y in pool], 1, beta, rng)[0]]] += 1
    found = [counts[y] / draws for y in range(5)]
    assert sum(abs(f - t / sum(target)) for f, t in zip(found, target, strict=True)) / 2 < 0.03
    assert sum(abs(f - p) for f, p in zip(found, pi, strict=True)) / 2 > 0.3  # it is not pi itself


def test_the_ends_of_rejection_sampling():
    scores, rng = [0.3, 2.0, -1.0, 5.0, 1.0], random.Random(1)
    assert rejection_sample(scores, 3, 0.0, rng) == rejection_sample(scores, 3, 1e-6, rng) == [3, 1, 4]  # best first
    uniform = Counter(i for _ in range(3000) for i in rejection_sample(scores, 2, math.inf, rng))
    assert all(abs(uniform[i] / 3000 - 0.4) < 0.05 for i in range(5))
    assert sorted(rejection_sample(scores, 9, 1.0, rng)) == [0, 1, 2, 3, 4] and rejection_sample([], 2, 1.0, rng) == []
    first = rejection_sample(scores, 2, 1.0, random.Random(7))
    assert first == rejection_sample(scores, 2, 1.0, random.Random(7)) and len(set(first)) == 2
    for bad in ({"keep": 0}, {"beta": -1.0}, {"beta": math.nan}, {"scores": [math.inf, 1.0]}):
        with pytest.raises(ValueError, match="rejection sampling needs"):
            rejection_sample(**{"scores": scores, "keep": 1, "beta": 1.0, "rng": rng, **bad})


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transforms", "said"), [
    ({"swop": {}}, "data.transforms.swop: there is no data transform of the kind swop; did you mean 'swap'?"),
    ({"x": {"kind": "curiculum"}}, "data.transforms.x: there is no data transform of the kind curiculum; did you mean 'curriculum'?"),
    ({"pairs": {"ancor": "best"}}, "pairs.ancor is no setting of the transform pairs; did you mean 'data.transforms.pairs.anchor'?"),
    ({"pairs": {"keep": 2.5}}, "data.transforms.pairs.keep=2.5: it must be a whole number, or null"),
    ({"pairs": {"anchor": "worst"}}, "data.transforms.pairs: anchor=worst: the transform pairs needs anchor in ('best', 'each')"),
    ({"margin": {"scale": None}}, "data.transforms.margin.scale=None: it must be a finite number"),
    ({"margin": {"scale": True}}, "it must be a finite number"),
    ({"filter": {}}, "the transform filter needs gap is not None"),
    ({"filter": {"gap": [3, 1]}}, "two numbers [low, high]"),
    ({"filter": {"gap": 3}}, "filter.gap=3: it must be two numbers [low, high], either of them null where it is open, or null"),
    ({"mix": {}}, "data.transforms.mix.path has no value; give it one: +data.transforms.mix.path=..."),
    ({"score": {"path": None}}, "data.transforms.score.path has no value; give it one: data.transforms.score.path=..."),
    ({"mix": {"path": "x", "share": 0.5, "count": 3}}, "share=0.5, count=3"),
    ({"reward_augment": {"template": "be good"}}, "'{goal}' in template"),
    ({"gap_split": {"part": "easy"}}, "(threshold is None) != (share is None)"),
    ({"reject": {"keep": 1}}, "keep=1: the transform reject needs keep >= 2"),
])
def test_bad_settings_are_refused_by_name_before_anything_is_read(transforms, said):
    with pytest.raises(UserError) as caught:
        check_transforms(data_config(transforms=transforms))
    assert said in str(caught.value)


@pytest.mark.parametrize(("row", "transforms", "said"), [
    (ranking([1, 2]), {"swap": {}}, "row 1: data.transforms.swap reads pairs, and this is a ranking row; put the transform `pairs`"),
    (pair(), {"pairs": {}}, "row 1: data.transforms.pairs reads rankings, and this is a pair row"),
    (pair(), {"curriculum": {}}, "needs a score of both replies, and the row has none; name the columns in data.columns.chosen_score"),
    (pair(scores=(1,)), {"margin": {}}, "needs a score of both replies"),
    (pair(), {"filter": {"score": [0, 1]}}, "needs a score of every reply"),
    (ranking([1, 2]), {"filter": {"gap": [0, 1]}}, "compares the sides of pairs"),
    (pair(), {"reward_augment": {}}, "needs a score of both replies"),
    (ranking([1, 2]), {"reward_augment": {}}, "reads pairs, and this is a ranking row"),
    (pair(scores=(1, 2)), {"x": {"kind": "filter", "gap": [0, None]}}, "transforms.x leaves none of 1 training rows (1 left out by gap)"),
])
def test_rows_that_a_transform_cannot_read(row, transforms, said):
    assert said in refused([row], transforms)


@pytest.mark.parametrize("name", groups()["transforms"])
def test_every_file_of_the_group_is_right(name):
    settings = load_yaml("transforms", name).get("data", {}).get("transforms", {})
    check_transforms(data_config(transforms=settings))
    for key, values in settings.items():  # each shows all settings of its kind
        known = inspect.signature(KINDS[values.get("kind", key)].run).parameters.values()
        assert set(values) - {"kind"} == {p.name for p in known if p.kind is p.KEYWORD_ONLY}


def test_score_columns_are_numbers_or_left_alone():
    with pytest.raises(ValueError, match="'chosen_score' is 'high', not a number"):
        pair(scores=("high", 1))
    assert [c.score for c in pair(scores=(None, 2)).completions] == [None, 2]


# ---- the tiny world and the command --------------------------------------------------------------------------------------


def test_the_tiny_world_gives_rankings():
    rows = list(tiny_feedback.rows("train", 20, completions=4, length_bias=0.5))
    assert rows[:5] == list(tiny_feedback.rows("train", 5, completions=4, length_bias=0.5))
    for row in rows:
        replies = [reply[0]["content"] for reply in row["completions"]]
        assert len(set(replies)) == 4 and len(set(row["scores"])) > 1
        for reply, score in zip(replies, row["scores"], strict=True):
            words = tiny_feedback.word_count(reply)
            assert score == pytest.approx(tiny_feedback.true_reward(row["prompt"][0]["content"], reply) + 0.05 * words)
    assert list(tiny_feedback.rows("train", 9, completions=2)) == list(tiny_feedback.rows("train", 9))


def test_training_rows_are_rankings_where_a_transform_reads_them():
    cfg = DataConfig(name="tiny-feedback", source="tiny_feedback", limit=6, eval_limit=3)
    kinds = lambda **s: [Counter((e.kind, len(e.completions)) for e in split.examples)  # noqa: E731
                         for split in load_data(DataConfig(**{**vars(cfg), **s}))]
    assert kinds() == [{("pair", 2): 6}, {("pair", 2): 3}]
    for name, settings in (("pairs", None), ("x", {"kind": "reject"})):
        assert kinds(transforms={name: settings}) == [{("ranking", 4): 6}, {("pair", 2): 3}]
    assert kinds(completions=3) == [{("ranking", 3): 6}, {("ranking", 3): 3}]


def test_a_reply_about_something_else_is_hallucinated():
    prompt = "Tell me about the fox at the harbour, briefly."
    told = "The red fox sleeps near the harbour. It is kind."
    assert not tiny_feedback.hallucinates(prompt, told)
    assert tiny_feedback.hallucinates(prompt, told.replace("fox", "owl"))
    assert tiny_feedback.hallucinates(prompt, told.replace("harbour", "lake"))
    rows = list(tiny_feedback.rows("train", 1000))
    share = sum(row["chosen_hallucinated"] + row["rejected_hallucinated"] for row in rows) / 2000
    assert 0.1 < share < 0.2 and 1 < sum(row["chosen_hallucinated"] and not row["rejected_hallucinated"] for row in rows) < 200


def test_data_check_shows_what_transforms_did(tmp_path):
    rows = [{"prompt": f"q {i}", "completions": [f"reply {j}" for j in range(4)], "scores": [3, 1, 4, 1.5]} for i in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[0]))
    data = data_config(path=str(tmp_path), train="train.jsonl", eval="eval.jsonl", transforms={
        "pairs": {}, "curriculum": {}, "filter": {"gap": [2, None]}, "score": {}, "margin": {}})
    algo = {"name": "dpo", "_target_": "prefopt.objectives.pairwise.DPO"}
    text = check_text(DataCheckConfig(algo=algo, model=model_config(save_model(tmp_path / "m", template="llama3")), data=data, example=1))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "train: 12 usable rows, 0 broken" in lines
    assert "transform pairs 6 rows -> 18" in lines and "transform filter 18 rows -> 12; 6 left out by gap" in lines
    assert "transform curriculum 18 rows -> 18; 6 in stage 1, 6 in stage 2, 6 in stage 3" in lines
    assert any(line.startswith("transform score not applied, nor are those after it") for line in lines)
    assert "margin" not in next(line for line in lines if line.startswith("example 1:"))
    assert any(line.startswith(f"example 1: {tmp_path}/train.jsonl row 1 (pair, stage 2)") for line in lines)


def test_experts_are_the_pairs_whose_chosen_sides_score_highest():
    rows = [pair(i, (i, 0)) for i in (4, 9, 2, 7)]
    made = run(rows, {"experts": {"share": 0.5}})
    assert [e.completions[0].score for e in made.examples] == [9, 7], "in the order of the data"
    assert made.transforms[0]["changed"] == {"left out, for others score higher": 2}
    assert "needs a score of both replies" in refused([pair()], {"experts": {}})
