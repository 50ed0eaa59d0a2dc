"""The loss of a step is the same however its rows are cut into micro-batches and dealt out to ranks."""

import random

import pytest
import torch
from samples import YAML, default, floats, random_rows, scored, several

from prefopt.data.batch import build, split_step
from prefopt.objectives.base import reduce_terms, total_weights

LOCAL = [s for s in YAML if default(s).coupling == "local"]
GLOBAL = [s for s in YAML if default(s).coupling == "global"]
ROWS = 11


class Scores:
    """Random log-probs of every token of every reply, one leaf per row and reply, so that any batch of rows can be scored."""

    def __init__(self, objective, rows, rng):
        self.objective, self.rows = objective, rows
        self.leaves = {scorer: {} for scorer in objective.quantities}
        for number, row in enumerate(rows):
            for place, branch in enumerate(row.edges(objective.view)):
                for scorer, made in self.leaves.items():
                    values = floats(-rng.uniform(0.05, 2) for _ in range(branch.trained))
                    made[number, place] = values.requires_grad_(scorer == "policy")

    def of(self, micro, filler=0):
        numbers = micro.rows or [filler]
        tokens = {
            scorer: torch.cat([leaf for n in numbers for (row, _), leaf in made.items() if row == n])
            for scorer, made in self.leaves.items()
        }
        return scored(self.objective, micro.layout, tokens)

    def build(self, chosen, filler=0):
        objective = self.objective
        return build(self.rows, chosen, objective.view, 0, soft_labels="label" in objective.columns, filler=filler)

    def gradients(self, loss):
        leaves = list(self.leaves["policy"].values())
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in
                zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)]


def close(share):
    return pytest.approx(share.item(), rel=1e-14, abs=1e-12)  # beyond 100, where Cal-DPO is, 1e-12 is less than rounding


def added(totals):
    return {name: sum(t[name] for t in totals) for name in totals[0]}


CUTS = [(1, 1), (40, 1), (60, 2), (35, 3), (10_000, 4), (1, ROWS + 2)]  # (budget of tokens, ranks)


@pytest.mark.parametrize("slug", LOCAL)
def test_trap_16_split_changes_neither_loss_nor_gradient(slug):
    rng = random.Random(f"split {slug}")
    for objective in several(slug, draws=1):
        rows = random_rows(objective, rng, ROWS)
        scores = Scores(objective, rows, rng)
        step = rng.sample(range(ROWS), ROWS)
        whole = scores.build(step)
        batch, totals = scores.of(whole), total_weights(objective, whole.layout)
        want, wanted_shares = reduce_terms(batch, objective(batch), totals)
        wanted_gradients = scores.gradients(want)
        assert want.item() != 0

        for cut in CUTS:
            ranks = split_step(rows, step, objective.view, *cut, rng.choice(["rows", "trees", "packed"]))
            assert len({len(micros) for micros in ranks}) == 1, f"{cut}: ranks would wait for each other"
            assert sorted(r for micros in ranks for micro in micros for r in micro) == sorted(step), cut
            fillers = [rng.randrange(ROWS) for rank in ranks for _ in rank]
            micros = [scores.build(chosen, filler=f) for chosen, f in zip([c for rank in ranks for c in rank], fillers, strict=True)]
            whole_weight = added([total_weights(objective, m.layout) for m in micros])
            assert whole_weight == {n: pytest.approx(t, rel=1e-6) for n, t in totals.items()}, cut
            got, got_shares = 0, dict.fromkeys(totals, 0)
            for micro, filler in zip(micros, fillers, strict=True):
                batch = scores.of(micro, filler)
                loss, shares = reduce_terms(batch, objective(batch), totals)
                got = got + loss
                got_shares = {name: got_shares[name] + share for name, share in shares.items()}
            assert got.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-12), cut
            assert {n: s.item() for n, s in got_shares.items()} == {n: close(s) for n, s in wanted_shares.items()}, cut
            for a, b in zip(scores.gradients(got), wanted_gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=lambda m, cut=cut: f"{cut}: {m}")


@pytest.mark.parametrize("slug", YAML)
def test_filler_adds_nothing(slug):
    rng = random.Random(f"filler {slug}")
    for objective in several(slug, draws=1):
        rows = random_rows(objective, rng, 3)
        scores = Scores(objective, rows, rng)
        totals = total_weights(objective, scores.build([0, 1, 2]).layout)
        for filler in range(3):
            micro = scores.build([], filler=filler)
            batch = scores.of(micro, filler)
            loss, _ = reduce_terms(batch, objective(batch), totals)
            assert loss.item() == 0 and not any(g.any() for g in scores.gradients(loss))
            assert not any(total_weights(objective, micro.layout).values())


@pytest.mark.parametrize("slug", YAML)
def test_order_of_rows_does_not_matter(slug):
    rng = random.Random(f"order {slug}")
    for objective in several(slug, draws=3):
        rows = random_rows(objective, rng, ROWS)
        scores, seen = Scores(objective, rows, rng), []
        for _ in range(3):
            micro = scores.build(rng.sample(range(ROWS), ROWS))
            batch = scores.of(micro)
            loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, micro.layout))
            seen.append((loss.item(), scores.gradients(loss)))
        for value, gradients in seen[1:]:
            assert value == pytest.approx(seen[0][0], rel=1e-6)  # row weights are kept in float32
            for a, b in zip(gradients, seen[0][1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("slug", GLOBAL)
def test_global_coupling_is_real(slug):
    """An objective that declares it needs the whole batch gives another loss on halves; else it should be local, which is faster."""
    rng, gaps = random.Random(f"coupling {slug}"), []
    for objective in several(slug, draws=6):
        rows = random_rows(objective, rng, ROWS)
        scores = Scores(objective, rows, rng)
        parts = [scores.build(list(range(5))), scores.build(list(range(5, ROWS)))]
        totals = added([total_weights(objective, p.layout) for p in parts])
        whole = scores.of(scores.build(list(range(ROWS))))
        one = reduce_terms(whole, objective(whole), totals)[0].item()
        halves = sum(reduce_terms(b, objective(b), totals)[0].item() for b in map(scores.of, parts))
        gaps.append(abs(one - halves))
    mixed = hasattr(default(slug), "mixed")  # where the coupled part is one of several, and its share of the loss a small one
    assert max(gaps) > (1e-6 if mixed else 1e-4)


@pytest.mark.parametrize("slug", YAML)
def test_row_weight_scales_its_share(slug):
    """A row of weight 0 is as good as absent, in every term."""
    rng = random.Random(f"weight {slug}")
    for objective in several(slug, draws=1):
        rows = random_rows(objective, rng, 6)
        for row in rows:
            row.mismatched = None  # the KL estimate is a mean over edges and knows no row weights
        rows[2].weight = 0.0
        scores = Scores(objective, rows, rng)
        seen = []
        for chosen in ([0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5]):
            micro = scores.build(chosen)
            batch = scores.of(micro)
            loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, micro.layout))
            seen.append((loss.item(), scores.gradients(loss)))
        assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
        for a, b in zip(seen[0][1], seen[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)
