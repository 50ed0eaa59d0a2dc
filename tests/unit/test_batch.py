"""Rows to steps and micro-batches: order, split over ranks, views, soft labels, mismatched replies."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from prefopt.data.batch import Row, build, derangement, split_step, step_rows
from prefopt.data.dataset import make_dataset, reduce_ranking
from prefopt.data.sources import Split
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.objectives.base import Batch, Pairs, Term, reduce_terms, total_weights, unit_weight
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.reference_free import CPO, ORPO, SimPO, SLiC
from prefopt.objectives.unary import KTO
from prefopt.policies.trees import plant
from tests.toy import data_config, example, pair, tokeniser, turns


def branch(length, start=10, untrained=0):
    return Branch(list(range(start, start + length)), [False] * untrained + [True] * (length - untrained), True)


def row(prompt=3, lengths=(4, 2), kind="pair", **known):
    branches = [branch(n, 10 * (i + 1)) for i, n in enumerate(lengths)]
    return Row(Tokens(list(range(1, prompt + 1)), branches, 0, [0] * len(lengths)), kind, **known)


def dataset(examples, view="pairs", columns=("weight", "label", "margin"), mismatched=False, **settings):
    cfg = data_config(**settings)
    return make_dataset(Split("train", examples), cfg, tokeniser("bytes", "chatml", **settings), view, columns, mismatched, 0)


# ---- order ----


@pytest.mark.parametrize(("total", "batch_size"), [(1, 1), (7, 3), (12, 4), (5, 8), (100, 7)])
def test_every_row_once_per_epoch_in_an_order_of_its_own(total, batch_size):
    per_epoch = -(-total // batch_size)
    epochs = [[r for s in range(per_epoch) for r in step_rows(total, batch_size, e * per_epoch + s, seed=1)] for e in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(total))
    if total > 10:
        assert len({tuple(order) for order in epochs}) == 3
        assert [r for s in range(per_epoch) for r in step_rows(total, batch_size, s, seed=2)] not in epochs


def test_a_step_is_the_same_whenever_it_is_asked_for():
    later = step_rows(50, 8, 31, seed=0)
    random.seed(5)
    assert [step_rows(50, 8, s, seed=0) for s in range(40)][31] == later


@pytest.mark.parametrize("count", [2, 3, 5, 64, 301])
def test_derangement_has_no_fixed_point(count):
    for seed in range(5):
        out = derangement(range(count), seed)
        assert sorted(out) == list(range(count))
        assert all(i != j for i, j in enumerate(out))
    if count > 4:
        assert derangement(range(count), 0) != derangement(range(count), 1)
    assert derangement(range(count), 3) == derangement(range(count), 3)


@pytest.mark.parametrize("prompts", ["aabb", "abcabcab", "aaabbc", "aaaab", "abbbbbcc", "aaaabbbcc"])
def test_no_row_is_sent_to_a_row_of_its_own_prompt(prompts):
    for seed in range(20):
        out = derangement(prompts, seed)
        assert all(prompts[i] != prompts[j] for i, j in enumerate(out)) and out == derangement(prompts, seed)
        most = max(map(prompts.count, prompts))
        used = sorted(map(out.count, range(len(prompts))))
        if 2 * most <= len(prompts):
            assert sorted(out) == list(range(len(prompts)))
        else:  # one prompt has more than half of the rows: they share the others evenly
            rare = [out.count(i) for i, p in enumerate(prompts) if prompts.count(p) < most]
            assert max(rare) - min(rare) <= 2 and used[-1] >= most // (len(prompts) - most)
    assert len({tuple(derangement(prompts, seed)) for seed in range(20)}) > 1 or len(set(prompts)) == 2


def test_one_prompt_alone_has_no_mismatched_reply():
    with pytest.raises(UserError, match=r"all rows that it is given have one prompt; add rows with other prompts"):
        derangement("aaa", 0)
    examples = [pair("How are you?", word, f"not {word}") for word in ("well", "ill")]
    with pytest.raises(UserError, match="have one prompt"):
        dataset(examples, "unary", mismatched=True)
    held_out = make_dataset(Split("eval", examples), data_config(), tokeniser("bytes"), "unary", ("weight",), True, 0)
    assert [row.mismatched for row in held_out.rows] == [None, None], "what is only judged goes without"


def test_mismatched_replies_answer_another_prompt_where_prompts_have_several_rows():
    words = ("well", "ill", "fine", "Paris", "Lima", "fox")
    examples = [pair(f"Question {i // 3}?", word, f"no {word}") for i, word in enumerate(words)]
    data = dataset(examples, "unary", mismatched=True)
    assert [tuple(row.tokens.prompt) for row in data.rows][0] == tuple(data.rows[2].tokens.prompt)
    own = [{str(b.ids) for row in data.rows[k : k + 3] for b in row.tokens.branches} for k in (0, 3)]
    for i, made in enumerate(data.rows):
        assert {str(b.ids) for b in made.mismatched} <= own[1 - i // 3]


# ---- split over ranks and micro-batches ----


LAYOUTS = ("rows", "trees", "packed")


def computed(rows, part, view, layout):
    """Tokens that a micro-batch costs, padding included where the layout pads."""
    micro = build(rows, part, view, 0)
    if layout == "rows":
        return micro.input_ids.numel()
    return micro.tree_tokens if layout == "packed" else plant(micro, 0).input_ids.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "budget", "count"), list(itertools.product([1, 2, 3, 5], [1, 60, 200, 10**6], [1, 4, 17])))
def test_split_step_covers_rows_once_and_keeps_ranks_and_budget_even(world, budget, count, layout):
    rng = random.Random(count)
    rows = [row(rng.randint(1, 20), (rng.randint(1, 20), rng.randint(1, 20))) for _ in range(40)]
    chosen = rng.sample(range(40), count)
    ranks = split_step(rows, chosen, "pairs", budget, world, layout)
    assert len(ranks) == world
    assert len({len(micro) for micro in ranks}) == 1
    assert sorted(r for micro in ranks for part in micro for r in part) == sorted(chosen)
    assert split_step(rows, rng.sample(chosen, count), "pairs", budget, world, layout) == ranks, "the order they were given in says nothing"
    cost = {r: math.prod(rows[r].size("pairs", layout)) for r in chosen}
    load = [sum(cost[r] for part in micro for r in part) for micro in ranks]
    assert max(load) - min(load) <= max(cost.values())
    for part in itertools.chain(*ranks):
        assert len(part) <= 1 or computed(rows, part, "pairs", layout) <= budget
    longest = max(chosen, key=lambda r: rows[r].size("pairs", layout)[1])
    assert longest in ranks[0][0]  # the dearest comes first, so that running out of memory shows at once


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_are_as_even_as_they_can_be(layout):
    """No cutting of the same order into as few parts has a cheaper dearest part."""
    rng = random.Random(4)
    for _ in range(20):
        rows = [row(rng.randint(1, 9), (rng.randint(1, 9), rng.randint(1, 9))) for _ in range(7)]
        (parts,) = split_step(rows, range(7), "pairs", 70, 1, layout)
        order = [r for part in parts for r in part]
        dearest = max(computed(rows, part, "pairs", layout) for part in parts)
        for cuts in itertools.combinations(range(1, 7), len(parts) - 1):
            other = [order[a:b] for a, b in itertools.pairwise((0, *cuts, 7))]
            assert max(computed(rows, part, "pairs", layout) for part in other) >= dearest
        for fewer in range(len(parts) - 1):
            for cuts in itertools.combinations(range(1, 7), fewer):
                other = [order[a:b] for a, b in itertools.pairwise((0, *cuts, 7))]
                assert max(computed(rows, part, "pairs", layout) for part in other) > 70


def test_ranks_share_the_work_and_not_the_rows():
    """One long row and many short ones: dealt by count alone, one of the ranks would do twice the work."""
    rows = [row(10, (100, 100)), *(row(10, (20, 20)) for _ in range(4))]
    ranks = split_step(rows, range(5), "pairs", 10**6, 2, "packed")
    assert [sorted(r for part in micro for r in part) for micro in ranks] == [[0], [1, 2, 3, 4]]


def test_split_counts_only_the_edges_that_a_view_reads():
    rows = [row(2, (3, 30)) for _ in range(4)]
    assert [len(p) for p in split_step(rows, range(4), "demonstrations", 20, 1)[0]] == [4]
    assert [len(p) for p in split_step(rows, range(4), "pairs", 20, 1)[0]] == [1, 1, 1, 1]


# ---- building ----


def test_build_pads_right_and_marks_the_trained_tokens():
    rows = [row(3, (4, 2)), row(1, (2, 3))]
    rows[1].tokens.branches[1] = branch(3, 50, untrained=1)
    micro = build(rows, [0, 1], "pairs", pad=99)
    assert micro.input_ids.tolist() == [
        [1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 20, 21, 99, 99], [1, 10, 11, 99, 99, 99, 99], [1, 50, 51, 52, 99, 99, 99],
    ]
    assert micro.attention.sum(1).tolist() == [7, 5, 3, 4] and micro.tokens == 19
    assert micro.tree.tolist() == [0, 0, 2, 2] and micro.prompt.tolist() == [3, 3, 1, 1] and micro.tree_tokens == 15
    assert micro.input_ids[micro.trained].tolist() == [10, 11, 12, 13, 20, 21, 10, 11, 51, 52]
    assert micro.layout.lengths.tolist() == [4, 2, 2, 2]
    assert micro.layout.token_edge.tolist() == [0] * 4 + [1] * 2 + [2] * 2 + [3] * 2
    assert (micro.layout.pairs.chosen.tolist(), micro.layout.pairs.rejected.tolist()) == ([0, 2], [1, 3])
    assert micro.gradient.all() and micro.rows == [0, 1]


@pytest.mark.parametrize("view", ["pairs", "unary", "demonstrations"])
def test_a_filler_has_edges_and_counts_nothing(view):
    rows = [row(9, (9, 9)), row(1, (1, 2))]
    micro = build(rows, [], view, pad=0, filler=1)
    assert micro.input_ids.shape[1] <= 3 and micro.rows == []
    sizes = {"pairs": lambda b: b.pairs.chosen, "unary": lambda b: b.unary.edge, "demonstrations": lambda b: b.demonstrations.edge}
    assert sizes[view](micro.layout).numel() == 0
    objective = {"pairs": DPO(), "unary": KTO()}.get(view)
    if objective:
        assert total_weights(objective, micro.layout) == {"preference": 0.0}


def test_moving_a_batch_moves_everything():
    micro = build([row()], [0], "pairs", pad=0)
    moved = micro.to("meta")
    tensors = [moved.input_ids, moved.attention, moved.trained, moved.gradient, moved.layout.lengths, moved.layout.token_edge,
               *vars(moved.layout.pairs).values()]
    assert all(t.device.type == "meta" for t in tensors)
    assert moved.layout.unary is None and moved.rows == [0]


def test_only_keeps_some_edges_and_their_tokens():
    micro = build([row(3, (4, 2))], [0], "pairs", pad=0)
    kept = micro.only(torch.tensor([False, True]))
    assert kept.input_ids[kept.trained].tolist() == [20, 21]
    assert kept.layout.lengths.tolist() == [2] and kept.layout.token_edge.tolist() == [0, 0]


def test_demonstrations_read_the_first_completion_only():
    micro = build([row(2, (3, 5), weight=0.5)], [0], "demonstrations", pad=0)
    assert micro.input_ids.shape == (1, 5)
    assert micro.layout.demonstrations.weight.tolist() == [0.5]


def test_unary_view_of_pairs_and_of_thumbs():
    rows = [row(weight=2.0), row(label=0.25), row(1, (2,), "unary", desirable=[False])]
    unary = build(rows, [0, 1, 2], "unary", pad=0).layout.unary
    got = set(zip(unary.edge.tolist(), unary.desirable.tolist(), unary.weight.tolist(), strict=True))
    assert got == {
        (0, True, 2.0), (1, False, 2.0),
        (2, True, 0.25), (3, False, 0.25), (2, False, 0.75), (3, True, 0.75),
        (4, False, 1.0),
    }


# ---- rankings ----


def ranking():
    return example(prompt="Q", completions=["w", "b", "m", "n"], scores=[0, 3, 1, 1])


def test_best_and_worst_of_a_ranking():
    data = dataset([ranking()])
    assert [c.text for c in data.examples[0].completions] == ["b", "w"]
    pairs = build(data.rows, [0], "pairs", 0).layout.pairs
    assert (pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.weight.tolist()) == ([0], [1], [1.0])


def test_all_pairs_of_a_ranking_share_the_weight_of_the_row_and_leave_out_ties():
    data = dataset([ranking()], pairs="all")
    pairs = build(data.rows, [0], "pairs", 0).layout.pairs
    assert set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)) == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}
    assert pairs.weight.sum().item() == pytest.approx(1)
    assert reduce_ranking(ranking(), "all").completions[0].score == 3


def test_equal_replies_of_a_ranking_make_no_pair():
    data = dataset([example(prompt="Q", completions=["same", "other", "same"], scores=[3, 2, 1])], pairs="all")
    pairs = build(data.rows, [0], "pairs", 0).layout.pairs
    assert set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)) == {(0, 1), (1, 2)}
    assert pairs.weight.tolist() == [0.5, 0.5]


# ---- soft labels ----


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_soft_labels_as_two_weighted_pairs_have_the_same_expected_logistic_loss(label, margin):
    scores = torch.tensor([-3.0, -1.2], dtype=torch.float64)

    def loss(soft):
        made = build([row(label=label, weight=1.5, margin=margin)], [0], "pairs", 0, soft_labels=soft).layout.pairs
        h = scores[made.chosen] - scores[made.rejected] - made.margin
        p = made.label.double()
        return (made.weight * (-p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h))).sum().item(), made

    (soft, _), (split, made) = loss(True), loss(False)
    assert soft == pytest.approx(split, rel=1e-6)
    assert (made.label == 1).all()
    assert len(made.chosen) == (1 if label in (0.0, 1.0) else 2)


def test_trap_17_a_label_of_one_half_counts_equally_in_both_directions():
    made = build([row(label=0.5)], [0], "pairs", 0, soft_labels=False).layout.pairs
    assert sorted(zip(made.chosen.tolist(), made.rejected.tolist(), made.weight.tolist(), strict=True)) == [(0, 1, 0.5), (1, 0, 0.5)]


# ---- mismatched replies ----


def test_mismatched_replies_come_from_another_row_under_this_prompt_and_carry_no_gradient():
    examples = [pair(f"How are you {word}?", f"I am {word}.", f"{word} {word}") for word in ("well", "Paris", "Lima", "fox")]
    data = dataset(examples, "unary", mismatched=True)
    other = derangement(range(4), 0)
    for i, made in enumerate(data.rows):
        assert [b.ids for b in made.mismatched] == [b.ids for b in data.rows[other[i]].tokens.branches]
    micro = build(data.rows, [0, 1], "unary", 0)
    assert micro.layout.unary.mismatched.tolist() == [2, 3, 6, 7]
    assert micro.gradient.tolist() == [True, True, False, False] * 2
    for edge, i in ((2, 0), (7, 1)):
        ids = micro.input_ids[edge][micro.attention[edge]].tolist()
        assert ids == data.rows[i].tokens.prompt + data.rows[i].mismatched[edge % 2].ids
    assert build(data.rows, [], "unary", 0).layout.unary.mismatched.numel() == 0
    again = dataset(examples, "unary", mismatched=True)
    assert [r.mismatched for r in again.rows] == [r.mismatched for r in data.rows]


def test_mismatched_replies_whose_tokens_merge_with_the_prompt():
    """Without a template prompt and reply may share a token; prompt + branch is still the tokenisation of the whole text."""
    t = tokeniser("bytes", render="text")
    examples = [pair("Two a", "nd two", "ny"), pair("Is th", "e fox", "x")]
    cfg = data_config(render="text")
    data = make_dataset(Split("train", examples), cfg, t, "unary", ("weight",), True, 0)
    for i, j in ((0, 1), (1, 0)):
        made = data.rows[i]
        for branches, replies in ((made.mismatched, examples[j].completions), (made.tokens.branches, examples[i].completions)):
            for b, reply in zip(branches, replies, strict=True):
                whole = t.tokenizer(examples[i].prompt_text + reply.text)["input_ids"]
                assert made.tokens.prompt + b.ids == [*whole, t.tokenizer.eos_token_id]


def test_mismatched_replies_that_truncation_makes_equal_are_no_error():
    examples = [pair("x" * 10, "one two", "two one"), pair("Q", "six seven", "six eight")]
    t = tokeniser("bytes", render="text", context=12)
    data = make_dataset(Split("train", examples), data_config(render="text"), t, "unary", ("weight",), True, 0)
    assert len(data.rows) == 2
    assert data.rows[0].mismatched[0].ids == data.rows[0].mismatched[1].ids


# ---- data that an objective cannot use ----


def test_data_that_the_objective_would_misread_is_refused():
    unary, demo, prompt = example(prompt="Q", completion="a", label=True), example(messages=turns("Q", "a")), example(prompt="Q")
    for view, row_, what in (("pairs", unary, "unary row, and the objective needs pairs"), ("pairs", demo, "demonstration row"),
                             ("unary", demo, "needs labelled completions"), ("demonstrations", prompt, "needs completions")):
        with pytest.raises(UserError, match=f"toy row 1: this is a .*{what}"):
            dataset([row_], view)
    with pytest.raises(UserError, match="the data has a margin, which this objective does not use"):
        dataset([pair(margin=0.5)], columns=("weight", "label"))


def test_thumbs_down_rows_are_no_demonstrations_and_are_counted():
    rows = [example(prompt="Q", completion=f"reply {i}", label=i % 2 == 0) for i in range(5)]
    data = dataset(rows, "demonstrations")
    assert (data.stats["rows"], data.stats["undesirable_left_out"]) == (3, 2)


# ---- traps 9 and 20, on what objectives make of batches ----


def scored(objective, lengths):
    """A batch of as many pairs as `lengths`, with random scores."""
    layout = build([row(2, ab) for ab in lengths], range(len(lengths)), objective.view, 0).layout
    g = torch.Generator().manual_seed(0)
    token = -torch.rand(layout.token_edge.numel(), generator=g)
    total = torch.zeros(len(layout.lengths)).index_add(0, layout.token_edge, token)
    names = objective.quantities
    layout.scores = {s: {"logp": total - 0.1 * i, "token_logp": token} for i, s in enumerate(names)}
    return layout


@pytest.mark.parametrize("objective", [DPO(), SimPO(), CPO(), ORPO(), SLiC(), KTO()], ids=lambda o: type(o).__name__)
def test_trap_20_every_term_has_one_value_per_unit(objective):
    batch = scored(objective, [(7, 2), (3, 11), (1, 1)])
    units = {"pair": 3, "completion": 6 if objective.view == "unary" else 3, "token": None}
    terms = objective(batch).terms
    assert terms
    for term in terms:
        assert isinstance(term, Term) and term.values.dim() == 1
        if term.unit != "token":
            assert len(term.values) == units[term.unit]
        assert torch.isfinite(term.values).all()


def test_trap_09_length_normalised_losses_never_meet_a_length_of_zero():
    """Every edge that is built has a trained token, because the tokeniser refuses rows without one."""
    micro = build(dataset([pair(), pair("Q", "a", "b")]).rows, [0, 1], "pairs", 0)
    assert micro.layout.lengths.min() >= 1
    blank = Batch(micro.layout.lengths, micro.layout.token_edge, {"policy": {"logp": torch.zeros(4)}}, micro.layout.pairs)
    assert isinstance(blank.pairs, Pairs) and torch.isfinite(blank.avg_logp()).all()


def test_trap_19_token_weights_of_a_two_token_example():
    """A weight belongs to a row, a term may have a value per token: by hand, with completions of two tokens and of one."""
    rows = [row(2, (2, 3), weight=2.0), row(1, (1, 1), weight=0.5)]
    micro = build(rows, [0, 1], "pairs", 0)
    token_logp = torch.tensor([-1.0, -3.0, -9.0, -9.0, -9.0, -4.0, -9.0], dtype=torch.float64)
    logp = torch.zeros(4, dtype=torch.float64).index_add(0, micro.layout.token_edge, token_logp)
    batch = replace(micro.layout, scores={"policy": {"token_logp": token_logp, "logp": logp}})
    objective = CPO(nll_token_mean=True, alpha=1.0)
    assert unit_weight(batch, objective(batch).terms[1]).tolist() == [2.0, 2.0, 0.5]
    totals = total_weights(objective, micro.layout)
    assert totals == {"preference": 2.5, "nll": 4.5}
    _, shares = reduce_terms(batch, objective(batch), totals)
    assert shares["nll"].item() == pytest.approx((2 * 1 + 2 * 3 + 0.5 * 4) / 4.5)


@pytest.mark.parametrize("view", ["pairs", "unary", "groups"])
def test_trap_28_what_belongs_together_stays_together(view):
    """However a step is cut and dealt out, the completions of a row meet in one micro-batch, where an objective can compare them."""
    rng = random.Random(view)
    rows = [row(3, [rng.randint(1, 9) for _ in range(4)], "ranking_all", scores=[4.0, 3.0, 2.0, 1.0]) for _ in range(9)]
    if view == "unary":
        rows = [row(3, (4, 2)) for _ in range(9)]
    for world, budget, layout in itertools.product((1, 2, 4), (1, 50, 10**6), LAYOUTS):
        for part in itertools.chain(*split_step(rows, range(9), view, budget, world, layout)):
            micro = build(rows, part, view, 0, filler=0)
            assert len(micro.layout.lengths) == (len(part) or 1) * len(rows[0].tokens.branches)
            if view == "groups":
                assert micro.layout.groups.group.unique().tolist() == [4 * i for i in range(len(part))]
