"""Extra sequences of pairs: what the templates make, how they are batched, scored, counted, stored and shown."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefopt.cli import main
from prefopt.config.catalogue import algo_info, load_yaml
from prefopt.config.compose import _check_extra
from prefopt.config.schema import ModelConfig, OptimConfig, SamplerConfig, TrainConfig
from prefopt.data import tiny_feedback
from prefopt.data.batch import Row, build, split_step
from prefopt.data.dataset import make_dataset
from prefopt.data.extra import BETTER, EXTRA, REVISE, WORSE, sequences
from prefopt.data.key_phrases import degraded, key_phrases
from prefopt.data.records import BadRow
from prefopt.data.sources import Split
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.evaluation.revise import self_revise
from prefopt.policies.causal_lm import Reply
from prefopt.policies.reference import make_reference
from prefopt.policies.trees import plant
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.coupling import join
from prefopt.training.engine import Engine
from prefopt.training.setup import make_objective
from tests import toy
from tests.toy import data_config, example, pair, tokeniser, turns
from tests.toy_runs import fresh_accelerator, train

SRPO, T_REG = (make_objective({**load_yaml("algo", slug)}) for slug in ("srpo", "t_reg"))
RATIONALE = "It names the capital."
PAIR = dict(prompt=turns("What is the capital of Peru?"), chosen=turns("x", "The capital of Peru is Lima.")[1:],
            rejected=turns("x", "Two and two make four today.")[1:], rationale=RATIONALE)
LIST = dict(prompt=turns("How are you?"), completions=["I am very well today.", "Not so well today, thank you.", "Two and two make four."],
            scores=[2, 1, 1])


def made(names, row=PAIR, template="chatml", context=512, **settings) -> tuple[Row, object]:
    words = tokeniser("bytes", template, context, **settings)
    data = make_dataset(Split("train", [example(**row)]), data_config(**settings), words, "pairs", ("weight", "label", "margin"), False, 0,
                        extra=names)
    return data.rows[0], words.tokenizer


def trained(words, branch: Branch) -> str:
    return words.decode([i for i, m in zip(branch.ids, branch.mask, strict=True) if m], skip_special_tokens=True)


# ---- templates ---------------------------------------------------------------------------------------------


def test_the_improver_revises_the_answer_that_it_is_shown():
    row, words = made(SRPO.extra)
    texts = {"chosen": "The capital of Peru is Lima.", "rejected": "Two and two make four today."}
    assert len(row.extra) == 4
    for name, tokens in zip(SRPO.extra, row.extra, strict=True):
        reply, shown = name.split("_from_")
        asked = words.decode(tokens.prompt)
        assert trained(words, tokens.branches[0]) == texts[reply]
        assert texts[shown] in asked and REVISE in asked and "What is the capital of Peru?" in asked
        assert asked.index("capital of Peru?") < asked.index(texts[shown]) < asked.index(REVISE)
        assert (texts["rejected" if shown == "chosen" else "chosen"] in asked) is False
    assert row.extra[0].prompt == row.extra[1].prompt != row.extra[2].prompt == row.extra[3].prompt


def test_both_requests_of_t_reg_get_the_tokens_of_the_reply():
    row, words = made(T_REG.extra)
    for i, tokens in enumerate(row.extra):
        own = row.tokens.branches[i // 2]
        assert tokens.branches[0].ids == own.ids and tokens.branches[0].mask == own.mask
        assert (BETTER if i % 2 == 0 else WORSE) in words.decode(tokens.prompt)


def test_only_the_rationale_is_trained_under_both_answers():
    """The answers in its prompt get no loss; the better one comes first."""
    row, words = made(("rationale",))
    (tokens,) = row.extra
    asked = words.decode(tokens.prompt)
    assert trained(words, tokens.branches[0]) == RATIONALE
    assert asked.index("Peru?") < asked.index("above") < asked.index("is Lima.") < asked.index("below") < asked.index("make four")
    micro = build([row], [0], "pairs", 0)
    edge = int(micro.layout.pairs.extra[0, 0])
    assert not micro.trained[edge, : len(tokens.prompt)].any() and int(micro.trained[edge].sum()) == tokens.branches[0].trained


@pytest.mark.parametrize("text", [dict(PAIR, prompt="How are you today?", chosen=" I am well today.", rejected=" I am not."),
                                  dict(PAIR, prompt=turns("Hi", "Hello there.", "How are you?"))])
@pytest.mark.parametrize("name", [name for name, how in EXTRA.items() if not how.beside])  # pictures: test_picture_objectives
def test_every_sequence_of_every_shape_of_row(name, text):
    row, words = made((name,), text, None if isinstance(text["prompt"], str) else "chatml")
    (tokens,) = row.extra
    assert tokens.prompt and tokens.branches[0].complete and trained(words, tokens.branches[0]).strip()


def test_a_row_without_a_rationale_is_refused_by_name_column_and_cure():
    row = {k: v for k, v in PAIR.items() if k != "rationale"}
    with pytest.raises(UserError, match=r"toy row 1: .*has no rationale.*data\.columns\.rationale.*on_bad_row=skip"):
        made(("rationale",), row)
    split = Split("train", [example(**row), example(**PAIR)])
    data = make_dataset(split, data_config(on_bad_row="skip"), tokeniser("bytes", "chatml"), "pairs", (), False, 0, extra=("rationale",))
    assert len(data.rows) == 1 and "rationale" in split.rejected[0].reason
    with pytest.raises(BadRow, match="'rationale' is '7', not a text"):
        example(**{**PAIR, "rationale": 7})


def test_pairs_of_a_ranking_have_sequences_of_their_own():
    row, words = made(SRPO.extra, LIST, pairs="all")
    assert row.pairs() == [(0, 1), (0, 2)] and len(row.extra) == 8
    replies = [trained(words, tokens.branches[0]) for tokens in row.extra]
    assert replies == [LIST["completions"][i] for better, worse in row.pairs() for i in (better, worse, worse, better)]
    micro = build([row], [0], "pairs", 0)
    assert micro.layout.pairs.extra.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert micro.layout.pairs.weight.tolist() == [0.5, 0.5]
    with pytest.raises(UserError, match="2 pairs and has one rationale; set data.pairs=best_worst"):
        made(("rationale",), dict(LIST, rationale=RATIONALE), pairs="all")
    assert len(made(("rationale",), dict(LIST, rationale=RATIONALE))[0].extra) == 1


def test_a_reply_that_is_cut_in_one_place_only_cannot_be_compared_token_by_token():
    row, _ = made(T_REG.extra)
    longest = max(tokens.longest for tokens in row.extra)
    assert made(T_REG.extra, context=longest)[0].extra
    with pytest.raises(UserError, match="other tokens than the (chosen|rejected) reply"):
        made(T_REG.extra, context=longest - 2)


def test_cut_sequences_are_counted_and_texts_decide_the_digest():
    def stats(context=512, rationale=RATIONALE):
        split = Split("train", [example(**{**PAIR, "rationale": rationale})])
        words = tokeniser("bytes", "chatml", context)
        return make_dataset(split, data_config(), words, "pairs", (), False, 0, extra=("rationale",)).stats

    whole = stats()
    assert whole["extra_sequences"] == 1 and whole["truncated_extra_sequences"] == 0
    assert stats(whole["longest"] - 3)["truncated_extra_sequences"] == 1
    assert stats(rationale="It is right.")["extra_sha256"] != whole["extra_sha256"] == stats()["extra_sha256"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="'rational'.*rationale"):
        made(("rational",))


# ---- degraded replies --------------------------------------------------------------------------------------

WORDS = "the a of quick red fox harbour sings loudly and or it is near lamp stone ; , . river runs cold Cold".split()


@pytest.mark.parametrize("seed", range(60))
def test_a_higher_level_lacks_more(seed):
    """The share of key phrases that are left falls strictly with the level, and nothing comes back."""
    rng = random.Random(seed)
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(8, 60))).replace(" ,", ",").replace(" .", ".").replace(" ;", ";")
    try:
        phrases = key_phrases(text, 3)
    except BadRow:
        assert len(set(re.findall(r"\w+", text.lower()))) < 3
        return
    left = [set(phrases), *(set(list(phrases)[round(len(phrases) * k / 3) :]) for k in (1, 2))]
    assert left[0] > left[1] > left[2] and left[2]
    counts = []
    for level, kept in ((0, left[0]), (1, left[1]), (2, left[2])):
        made = degraded(text, level) if level else text
        words = re.findall(r"\w+", made.lower())
        counts.append(len(words))
        spaced = f" {' '.join(words)} "
        assert all(f" {phrase} " in spaced for phrase in kept)
        removed = sum(len(phrases[p]) * len(p.split()) for p in left[0] - kept)
        assert len(words) == len(re.findall(r"\w+", text)) - removed
    assert counts[0] > counts[1] > counts[2] > 0


def test_the_weightiest_phrases_go_first():
    text = "Linear constraints over natural numbers, and linear systems; the numbers are small."
    assert list(key_phrases(text))[:2] == ["linear constraints", "linear systems"]
    assert degraded(text, 1) == "over natural numbers, and; the numbers are small."
    assert degraded("It is kind, gentle and brave.", 2) == "It is, and brave."


def test_too_short_a_reply_is_refused():
    with pytest.raises(BadRow, match="a reply of 2 words"):
        degraded("Yes, yes.", 1)
    with pytest.raises(UserError, match="toy row 1: a reply of 1 words"):
        made(("chosen_degraded_1",), dict(PAIR, chosen=turns("x", "Lima.")[1:]))


def test_degraded_replies_share_the_prompt_of_the_pair():
    row, _ = made(("chosen_degraded_1", "chosen_degraded_2", "rejected_degraded_1", "rejected_degraded_2"))
    assert [len(tree.branches) for tree in row.trees("pairs")] == [6]
    lengths = [tokens.branches[0].trained for tokens in row.extra]
    assert row.tokens.branches[0].trained > lengths[0] > lengths[1] and row.tokens.branches[1].trained > lengths[2] > lengths[3]


# ---- batches -----------------------------------------------------------------------------------------------


def toy_row(start: int, extra=((3, 2), (3, 4), (5, 1), (5, 6)), prompt=4, replies=(3, 2), **known) -> Row:
    def branch(n, first):
        return Branch([first + i for i in range(n)], [True] * n, True)

    sequences = [Tokens([start + 50 + p] * p, [branch(n, start + 9 * i)], 0, [0]) for i, (p, n) in enumerate(extra)]
    return Row(Tokens([start] * prompt, [branch(n, start + 20 * i) for i, n in enumerate(replies)]), "pair", extra=sequences, **known)


def test_edges_trees_and_views():
    rows = [toy_row(5), toy_row(7, label=0.25, weight=2.0)]
    micro = build(rows, [1, 0], "pairs", 0)
    assert micro.layout.pairs.chosen.tolist() == [0, 6] and micro.layout.pairs.rejected.tolist() == [1, 7]
    assert micro.layout.pairs.extra.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    assert micro.layout.pairs.label.tolist() == [0.25, 1.0]
    assert micro.tree.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10], "sequences under one prompt share it"
    assert micro.prompt.tolist() == [4, 4, 3, 3, 5, 5] * 2
    assert micro.extra.tolist() == [False, False, True, True, True, True] * 2
    assert build([replace(r, extra=[]) for r in rows], [0, 1], "pairs", 0).extra is None
    filler = build(rows, [], "pairs", 0, filler=1)
    assert filler.layout.pairs.extra.shape == (0, 4) and len(filler.tree) == 6 and filler.extra.sum() == 4
    joined = join([replace(m.layout, scores={}) for m in (micro, filler, build(rows, [0], "pairs", 0))])
    assert joined.pairs.extra.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11], [20, 21, 22, 23]]


def test_other_views_know_nothing_of_them():
    row = toy_row(5, stored={"reference": [float(-i) for i in range(6)]})
    for view in ("unary", "demonstrations"):
        micro = build([row], [0], view, 0)
        assert len(micro.tree) == (2 if view == "unary" else 1) and micro.extra is None
        assert micro.stored["reference"]["logp"].tolist() == [0.0, -1.0][: len(micro.tree)]
    assert build([row], [0], "pairs", 0).stored["reference"]["logp"].tolist() == [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]


@pytest.mark.parametrize("layout", ["rows", "trees", "packed"])
def test_what_a_row_counts_is_what_is_computed(layout):
    rng = random.Random(layout)
    rows = [toy_row(5 + i, tuple((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(4)), rng.randint(1, 9)) for i in range(12)]
    for row in rows:
        micro = build([row], [0], "pairs", 0)
        count, longest = row.size("pairs", layout)
        actual = {"rows": micro.input_ids.numel(), "packed": micro.tree_tokens, "trees": plant(micro, 0).input_ids.numel()}[layout]
        assert count * longest == actual
    for budget in (60, 200):
        parts = split_step(rows, range(12), "pairs", budget, 2, layout)
        assert sorted(r for rank in parts for part in rank for r in part) == list(range(12))
        for part in (part for rank in parts for part in rank if len(part) > 1):
            micro = build(rows, part, "pairs", 0)
            sizes = {"rows": micro.input_ids.numel(), "packed": micro.tree_tokens, "trees": plant(micro, 0).input_ids.numel()}
            assert sizes[layout] <= budget


def test_a_scorer_is_asked_for_its_part_only():
    micro = build([toy_row(5), toy_row(7)], [0, 1], "pairs", 0)
    assert micro.part("policy", ("policy", "reference")) is micro
    part = micro.part("policy", ("reference",))
    plain = build([toy_row(5, extra=()), toy_row(7, extra=())], [0, 1], "pairs", 0)
    for name in ("input_ids", "attention", "trained", "prompt"):
        assert torch.equal(getattr(part, name), getattr(plain, name)), name


# ---- scores ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def engine(folder, objective, accelerator, **settings) -> Engine:
    policy = toy.policy(folder, **settings)
    return Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(lr=0.0), accelerator)


def test_who_is_not_asked_says_zero(folder):
    rows = [toy_row(5), toy_row(7)]
    micro = build(rows, [0, 1], "pairs", 0)
    with fresh_accelerator() as accelerator:
        both, one = (engine(folder, objective, accelerator).score(micro) for objective in (SRPO, T_REG))
    of_extra = micro.extra[micro.layout.token_edge]
    for scorer in ("policy", "reference"):
        assert torch.equal(one.logp(scorer)[~micro.extra], both.logp(scorer)[~micro.extra])
    assert (both.logp("policy") < 0).all() and torch.equal(one.logp("reference"), both.logp("reference"))
    assert not one.logp("policy")[micro.extra].any() and not one.scores["policy"]["token_logp"][of_extra].any()
    assert torch.equal(one.scores["reference"]["token_logp"][of_extra], both.scores["reference"]["token_logp"][of_extra])


@pytest.mark.parametrize("settings", [{}, {"share_prompts": False}], ids=["trees", "rows"])
@pytest.mark.parametrize("slug", ["srpo", "t_reg", "rationale_orpo"])
def test_executed_flops_are_those_that_torch_counts(folder, slug, settings):
    objective = make_objective({**load_yaml("algo", slug)})
    sequences = {"srpo": ((3, 2), (3, 4), (5, 1), (5, 6)), "t_reg": ((12, 3), (12, 3), (9, 2), (9, 2)), "rationale_orpo": ((20, 7),)}[slug]
    rows = [toy_row(5, sequences), toy_row(7, sequences, prompt=9)]
    with fresh_accelerator() as accelerator:
        made = engine(folder, objective, accelerator, attention="eager", **settings)
        micros = [build(rows, chosen, "pairs", 0) for chosen in ([0, 1], [])]
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}  # torch's counter knows addmm alone
        with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
            result = made.step(micros, 0.0)
    assert abs(result.effort.executed / counted.get_total_flops() - 1) < 1e-3


@pytest.mark.parametrize("slug", ["srpo", "t_reg", "rationale_po"])
def test_a_run_with_stored_scores_is_a_run_with_live_ones(slug, tmp_path):
    losses = []
    for store in ("on", "off"):
        run = tmp_path / store
        assert train(run, f"algo={slug}", f"reference.store={store}", "evaluation.prompts=0") == 0
        rows = read_jsonl(run / "metrics.jsonl")
        losses.append([r["loss"] for r in rows if r["split"] in ("train", "eval")])
        (check,) = [r for r in rows if r["split"] == "check"]
        assert check["loss"] == pytest.approx(check["theory"], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) > 1


# ---- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["model=bandit", "data=bandit"], r"model=bandit is a table over the prompts"),
    (["source=rounds"], r"source=rounds writes the pairs while it trains.*use source=offline"),
])
def test_what_cannot_be_made_is_refused_at_composition(words, said, tmp_path, capsys):
    assert train(tmp_path / "run", "algo=srpo", *words) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("quantities", [{"policy": ("token_logp", "divergence"), "reference": ("token_logp",)},
                                        {"policy": ("token_logp",), "reference": ("token_logp", "layers")}])
def test_states_of_sequences_that_the_policy_does_not_score_are_refused(quantities):
    info = algo_info("t_reg")
    cfg = TrainConfig(algo={}, model=ModelConfig(name="m"), data=data_config())
    assert "policy" not in info.extra_scorers and _check_extra(cfg, info) is None
    with pytest.raises(UserError, match=r"the policy does not score the extra sequences \(chosen_if_better.*put `policy` among"):
        _check_extra(cfg, replace(info, quantities=quantities))
    assert _check_extra(cfg, replace(info, quantities=quantities, extra_scorers=("policy", "reference"))) is None


def test_data_check_shows_them(capsys):
    assert main(["data", "check", "algo=rationale_po", "data.limit=30", "data.eval_limit=8"]) == 0
    out = capsys.readouterr().out
    row = next(tiny_feedback.rows("train", 1))
    shown = out[out.index("extra sequence rationale: prompt, ") :]
    assert f"⟦{row['rationale']}" in shown
    assert re.search(r"extra sequences +30, 0 of them truncated", out)


def test_a_revision_is_asked_for_as_srpo_trains_it():
    asked = []

    class Writer:
        def prompt_ids(self, prompt, chat):
            asked.append([(m.role, m.text) for m in prompt])
            return [len(asked)]

        def generate(self, prompts, sampler, seed):
            return [Reply([1], True, f"reply {p[0]} of seed {seed}") for p in prompts]

    written = self_revise(Writer(), [pair(turns("Q"), turns("x", "a")[1:], turns("x", "b")[1:])], SamplerConfig(), 5, 2)
    assert written == [["reply 1 of seed 5", "reply 2 of seed 6", "reply 3 of seed 7"]]
    assert asked[0] == [("user", "Q")]
    assert asked[2] == [("user", "Q"), ("assistant", "reply 2 of seed 6"), ("user", REVISE)]
    shown = example(**{**PAIR, "rejected": turns("x", "reply 2 of seed 6")[1:], "prompt": turns("Q")})
    words = tokeniser("bytes", "chatml")
    (tokens,) = sequences(shown, words(shown), [(0, 1)], ("chosen_from_rejected",), words)
    assert [(m.role, m.text) for m in EXTRA["chosen_from_rejected"].make(shown)[0]] == asked[2] and tokens.prompt


def test_sampling_with_revisions(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "algo=srpo", "evaluation.prompts=0") == 0
    capsys.readouterr()
    assert main(["sample", f"run={run}", "count=2", "revise=2"]) == 0
    out = capsys.readouterr().out
    assert out.count("revision 1: ") == out.count("revision 2: ") == 2


# ---- the tiny world's rationales ---------------------------------------------------------------------------


def test_rationales_say_what_the_reward_counts():
    def why(chosen, rejected, style=""):
        return tiny_feedback.rationale(f"Tell me about the fox at the harbour{style}.", chosen, rejected)

    good, plain = "The red fox sleeps near the harbour. It is kind.", "The red fox sleeps near the harbour."
    assert why(good, plain) == "It is kind."
    assert why(plain, "The red cat sleeps near the harbour. It is rude.") == "It is about the fox. It is not about the cat. It is not rude."
    assert why(f"{plain} You would love it, dear friend.", plain, ", warmly") == "It is to a dear friend."
    assert why(f"{plain} It eats honey at noon.", plain, ", in detail") == "It is in detail."
    assert why(plain, f"{plain} It is kind. It eats honey at noon.", ", briefly") == "It is not on and on for hours."
    assert why(plain, good).startswith("As far as anyone can tell")


def test_the_worlds_model_knows_every_word_of_them():
    known = set(tiny_feedback.vocabulary())
    texts = [row["rationale"] for row in tiny_feedback.rows("train", 600)]
    assert all(set(re.findall(r"\w+|[^\w\s]", text)) <= known for text in texts)
    assert len(set(texts)) > 200
    better = [r for r in tiny_feedback.rows("train", 600) if r["chosen_reward"] > r["rejected_reward"] + 0.5]
    assert sum(r["rationale"].startswith("As far as") for r in better) < 0.02 * len(better)


def test_a_rationale_beside_another_loss(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "algo=mpo", "algo.parts=[{algo: simpo}, {algo: rationale_nll, weight: 0.01}]", "evaluation.prompts=0") == 0
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "train"]
    assert all(r["loss/rationale_nll_rationale"] > 0 for r in rows)
    assert train(tmp_path / "two", "algo=mpo", "algo.parts=[{algo: t_reg}, {algo: rationale_nll}]") == 2
    assert "a mixture takes those of one part" in " ".join(capsys.readouterr().err.split())
