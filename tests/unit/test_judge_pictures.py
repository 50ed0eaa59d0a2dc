"""Judging pictures: accuracy in each quarter of the process against one draw at a time, and measures of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from prefopt.config.schema import OptimConfig, SamplerConfig
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.unary import KTO
from prefopt.policies.reference import FrozenCopy
from prefopt.report import picture_measures
from prefopt.report.estimators import wins
from prefopt.training.engine import Engine
from prefopt.training.judge import AT_TIMES, SHARES, Judge
from prefopt.training.metrics import TIE
from tests.toy_pictures import picture_policy, picture_source, pictured, rows_of
from tests.toy_runs import fresh_accelerator

PROMPTS = ["a cat", "a dog", "a cat", "two birds", "a fish"]


@pytest.fixture
def accelerator():
    with fresh_accelerator() as made:
        yield made


def judged(accelerator, objective, draws: int, budget: int, label: float = 1.0):
    """(policy, reference, rows, judge) of a policy that has moved."""
    policy = picture_policy(held_out=draws)
    reference = FrozenCopy(policy)
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable().values()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    examples = [pictured(prompt, f"good.{i}", f"bad.{i}", label=label) for i, prompt in enumerate(PROMPTS)]
    rows = rows_of(policy, objective, examples, held_out=True)
    engine = Engine(policy, objective, reference, OptimConfig(lr=1e-3), accelerator)
    return policy, reference, rows, Judge(engine, picture_source(policy, objective, rows, budget), [], SamplerConfig(), 0, {}, None)


@pytest.mark.parametrize("budget", [10**6, 1], ids=["whole", "split"])
@pytest.mark.parametrize("objective", [DPO(beta=0.5), DPO(beta=2.0), KTO(beta=0.5)], ids=["dpo", "stronger", "coupled"])
def test_accuracy_by_noise_is_that_of_single_draws(accelerator, objective, budget):
    policy, reference, rows, judge = judged(accelerator, objective, 6, budget)
    single = picture_policy(held_out=1)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in AT_TIMES}
    for row, prompt in zip(rows, PROMPTS, strict=True):
        group, *numbers = row.tokens.branches[0].ids[2:]
        for number in numbers:
            branches = [policy.draws.branch(*branch.ids[:3], [number]) for branch in row.tokens.branches]
            alone = [type(row)(type(row.tokens)(row.tokens.prompt, [branch]), "demonstration") for branch in branches]
            ratios = []
            for one in alone:
                source = picture_source(single, objective, [one])
                source.view = "demonstrations"
                (micro,) = source.everything("demonstrations")
                with torch.no_grad():
                    ratios.append(float(policy(micro)["token_logp"]) - float(reference(micro)["token_logp"]))
            place = int(4 * policy.draws.time(group, number)[0])
            found[AT_TIMES[place]].setdefault(prompt, []).append(float(wins(ratios[:1], ratios[1:], 6 * TIE)[0]))
    measured = judge.measure(0).pairs
    seen = {name: [x for values in of.values() for x in values] for name, of in found.items()}
    assert sum(map(len, seen.values())) == 6 * len(PROMPTS) and len({np.mean(values) for values in seen.values() if values}) > 1
    for name, values in seen.items():
        assert (name in measured) == bool(values)
        if values:
            assert measured[name].mean() == pytest.approx(np.mean(values)) and len(measured[name]) == len(found[name])
            assert name in SHARES


def test_a_label_below_one_half_prefers_the_other_picture(accelerator):
    (*_, first), (*_, second) = judged(accelerator, DPO(), 4, 10**6), judged(accelerator, DPO(), 4, 10**6, label=0.0)
    one, two = first.measure(0).pairs, second.measure(0).pairs
    for name in AT_TIMES:
        if name in one and name in two:
            assert two[name].mean() == pytest.approx(1 - one[name].mean())


def test_a_policy_that_is_its_reference_ties_at_every_draw(accelerator):
    policy, _, _, judge = judged(accelerator, DPO(), 4, 10**6)
    judge.engine.reference = FrozenCopy(policy)
    measured = judge.measure(0).pairs
    assert {name for name in measured if name.startswith("accuracy")} > {"accuracy"}
    assert all((values == 0.5).all() for name, values in measured.items() if name.startswith("accuracy"))
    assert not any("per_token" in name for name in measured)


def test_samples_are_described_as_pictures(accelerator):
    *_, judge = judged(accelerator, DPO(), 1, 10**6)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(4)]
    samples = [{"id": i, "prompt": f"p{i}", "image": image, "reward": 0.1 * i, "log_ratio": 0.2} for i, image in enumerate(images)]
    judge.rewards = {"true_reward": lambda examples: []}
    judge.parts = lambda prompt, image: {"count": float(prompt == "p1"), "colour": 1.0, "aesthetic": -0.5}
    found = judge.describe(samples, {i: dict(s, reward=0.15) for i, s in enumerate(samples)})
    assert set(found) == {"true_reward", "win_rate", "kl", "saturation", "high_frequency", "variety", "start_distance", "match/count",
                          "match/colour", "prompt_match", "all_parts", "held_out/look"}  # fmt: skip
    assert found["start_distance"].tolist() == [0, 0, 0, 0], "the same pictures"
    assert found["win_rate"].tolist() == [0, 0, 1, 1] and found["match/count"].tolist() == [0, 1, 0, 0]
    assert found["prompt_match"].tolist() == [0.5, 1, 0.5, 0.5] and found["all_parts"].tolist() == [0, 1, 0, 0]
    assert found["held_out/look"].tolist() == [-0.5] * 4, "no part of what was asked for"
    assert found["saturation"].tolist() == picture_measures.saturation(images).tolist()
    assert {len(values) for values in found.values()} == {4}
