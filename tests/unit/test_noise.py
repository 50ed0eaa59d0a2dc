"""Times and noises of draws: pure functions of numbers, spread evenly, shared where they are to be shared."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.config.schema import NoiseConfig
from prefopt.data.batch import Row
from prefopt.data.tokenise import Tokens
from prefopt.policies.noise import HEAD, HELD_OUT, Draws, address, normals, share

MANY = 4000


def draws(seed: int = 0, **settings) -> Draws:
    return Draws(NoiseConfig(**settings), seed)


def test_addresses_are_positive_and_tell_things_apart():
    found = {address(*parts) for parts in (("a",), ("b",), ("a", 1), ("a", "1"), (("a", 1),))}
    assert len(found) == 5 and all(0 < a < 2**63 for a in found)
    assert address("a", 1) == 2057769193037142695, "it must be the same on every machine and in every version"


def test_draws_follow_from_numbers_alone():
    """Asked in another order, by another object, they are the same; of another row, number or seed they are not."""
    one, two = draws(), draws()
    pairs = [(group, number) for group in (5, 9) for number in range(4)]
    first = {p: (one.time(*p), one.noise((2, 3), *p, picture=1)) for p in pairs}
    for p in reversed(pairs):
        assert two.time(*p) == first[p][0] and torch.equal(two.noise((2, 3), *p, picture=1), first[p][1])
    assert len({time for time, _ in first.values()}) == len(pairs)
    assert len({float(noise[0, 0]) for _, noise in first.values()}) == len(pairs)
    assert draws(seed=1).time(5, 0) != one.time(5, 0)
    before = torch.get_rng_state()
    one.noise((2,), 5, 0, 1)
    assert torch.equal(before, torch.get_rng_state()), "no global state is touched"


def test_pictures_of_a_row_share_the_noise_unless_it_is_independent():
    shared, own = draws(), draws(plan="independent")
    assert torch.equal(shared.noise((8,), 5, 0, 1), shared.noise((8,), 5, 0, 2))
    assert not torch.equal(own.noise((8,), 5, 0, 1), own.noise((8,), 5, 0, 2))
    assert shared.time(5, 0) == own.time(5, 0)


def test_noise_is_standard_normal():
    noise = torch.cat([draws().noise((256,), 3, number, 1) for number in range(200)])
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert abs(float((normals((4096,), "x") * normals((4096,), "y")).mean())) < 0.05


def test_times_of_a_row_are_spread_more_evenly_than_by_chance():
    """Star discrepancy of the first n times of a row: near log(n)/n instead of 1/sqrt(n)."""
    def gap(values: list[float]) -> float:
        n = len(values)
        return max(max((i + 1) / n - v, v - i / n) for i, v in enumerate(sorted(values)))

    one = draws()
    for n in (8, 64, 512):
        for group in (1, 2, 3):
            assert gap([one.quantile(group, number) for number in range(n)]) < 1.2 * math.log(n + 1) / n + 1 / n
    by_chance = sum(gap([share("chance", k, i) for i in range(512)]) for k in range(5)) / 5
    assert by_chance > 3 * gap([one.quantile(1, number) for number in range(512)])


def test_each_draw_is_uniform_over_rows():
    """The first draw and the third, each over many rows: mean, variance and thirds of the uniform distribution."""
    for number in (0, 2, HELD_OUT + 1):
        found = torch.tensor([draws().quantile(group, number) for group in range(MANY)], dtype=torch.float64)
        assert 0 <= float(found.min()) and float(found.max()) < 1
        assert float(found.mean()) == pytest.approx(0.5, abs=0.02) and float(found.var()) == pytest.approx(1 / 12, abs=0.004)
        assert float((found < 1 / 3).double().mean()) == pytest.approx(1 / 3, abs=0.03)


def test_the_range_of_times_is_kept():
    found = [draws(low=0.2, high=0.6).time(group, 0)[0] for group in range(300)]
    assert min(found) >= 0.2 and max(found) <= 0.6 and min(found) < 0.22 and max(found) > 0.58


def test_logit_normal_times_have_their_logit_normal():
    times = torch.tensor([draws(timesteps="logit_normal", logit_mean=0.5, logit_std=0.7).time(g, 0)[0] for g in range(MANY)])
    assert float(times.logit().mean()) == pytest.approx(0.5, abs=0.04) and float(times.logit().std()) == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize("function", [lambda u: u, lambda u: u * u, lambda u: math.sin(9 * u)], ids=["mean", "square", "wave"])
def test_importance_weights_give_the_uniform_expectation(function):
    one = draws(timesteps="importance", logit_mean=-0.5, logit_std=0.8)
    found = [one.time(group, 0) for group in range(4 * MANY)]
    values = torch.tensor([function(u) * w for u, w in found], dtype=torch.float64)
    uniform = sum(function((i + 0.5) / 10_000) for i in range(10_000)) / 10_000
    assert float(values.mean()) == pytest.approx(uniform, abs=4 * float(values.std()) / math.sqrt(len(values)))
    assert sum(w for _, w in found) / len(found) == pytest.approx(1, abs=0.02) and max(w for _, w in found) <= 2
    plain = sum(function(u) for u, _ in found) / len(found)
    assert abs(plain - uniform) > 0.01, "the times themselves are not uniform"


def test_held_out_draws_are_the_same_in_every_run():
    """Whatever the run's seed, plan of times, dropout and mirror: what pictures are judged at is common ground."""
    one, two = draws(seed=0, timesteps="importance", dropout=0.9), draws(seed=7)
    for number in (HELD_OUT, HELD_OUT + 3):
        assert one.time(5, number) == two.time(5, number) and one.time(5, number)[1] == 1
        assert torch.equal(one.noise((4,), 5, number, 1), two.noise((4,), 5, number, 1))
        assert not any(one.dropped(group, number) or one.mirrored(group, number) for group in range(50))
    assert one.numbers(held_out=True) == [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2, HELD_OUT + 3]


def test_trap_4_8_captions_are_dropped_at_their_rate_and_for_the_whole_row():
    """The draw knows nothing of the picture, so all of a row lose their caption together."""
    one = draws(dropout=0.2)
    found = [one.dropped(group, 0) for group in range(MANY)]
    assert sum(found) / MANY == pytest.approx(0.2, abs=0.025)
    assert len({one.dropped(1, number) for number in range(60)}) == 2, "not the same rows at every visit"
    assert not any(draws().dropped(group, 0) for group in range(100))


def test_half_of_the_visits_see_a_row_in_the_mirror():
    found = [draws().mirrored(group, number) for group in range(200) for number in range(10)]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.04)


def row_of(one: Draws, stored: list[float] | None = None) -> Row:
    tokens = Tokens([77], [one.branch(p, 77, 5, one.numbers(False)) for p in (1, 2)])
    return Row(tokens, "pair", stored={"reference": [stored, stored]} if stored else {})


def test_every_visit_has_new_draws():
    one = draws(draws=2)
    seen = [one.at(row_of(one), visit).tokens.branches[1].ids[HEAD:] for visit in range(3)]
    assert seen == [[0, 1], [2, 3], [4, 5]]
    (branch, _) = one.at(row_of(one), 1).tokens.branches
    assert branch.ids[:HEAD] == [1, 77, 5] and branch.mask == [False, False, False, True, True]


def test_a_pool_is_taken_in_turn_and_stored_scores_go_along():
    """Stored of each draw is its share of the mean over the pool; a visit's mean is over its own draws. Two runs share a pool."""
    one = draws(draws=2, pool=3)
    whole = row_of(one, [-1.0, -2.0, -4.0])
    assert whole.tokens.branches[0].ids[HEAD:] == [0, 1, 2]
    for visit, numbers, scores in ((0, [0, 1], [-1.5, -3.0]), (1, [2, 0], [-6.0, -1.5]), (3, [0, 1], [-1.5, -3.0])):
        made = one.at(whole, visit)
        assert made.tokens.branches[0].ids[HEAD:] == numbers and made.stored["reference"][1] == pytest.approx(scores)
    assert whole.stored["reference"][0] == [-1.0, -2.0, -4.0], "the row that is kept stays as it is"
    assert draws(seed=1, pool=3).time(5, 1) == draws(seed=2, pool=3).time(5, 1)
