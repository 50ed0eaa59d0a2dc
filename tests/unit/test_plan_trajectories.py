"""`prefopt plan` of runs that learn from sampling trajectories, held against runs of a pipeline with random weights and torch's counter."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prefopt.cli import main
from prefopt.policies.guidance import Guidance
from prefopt.training import plan_pictures, scorers
from prefopt.training.engine import Engine
from prefopt.training.plan_trajectories import Rounds
from prefopt.training.trajectories import TrajectorySource
from tests import tiny_pipelines
from tests.toy_runs import FAST, train

SMALL = ["model.resolution=16", "model.latent=[4,2]", "model.gradient_checkpointing=false", "data=tiny-pictures", "data.limit=8",
         "data.eval_limit=2", "source.prompts=4", "source.samples=3", "train.batch_size=2", "train.steps=2", "train.micro_batch_tokens=5",
         "trajectory.steps=4", "trajectory.window_size=null", "trajectory.early=1", "evaluation.prompts=0", "evaluation.kl=false",
         "train.self_check=false", "sampler.batch_size=5", "hardware.peak_tflops=0.1"]
# family, words, transitions of a step; forward passes for each picture of a round
SETTINGS = {
    "groups": ("sd3", ["algo=flow_grpo", "model.guidance=2.5"], 2 * 3 * 4, 2 * 4),
    "both branches": ("sd15", ["algo=ddpo", "model.guidance=2.5", "~adapter"], 2 * 3 * 3, 2 * 4),
    "candidates": ("sd15", ["algo=spo_diffusion", "model.guidance=1", "trajectory.window=[1,3]", "trajectory.candidates=2",
                            "trajectory.threshold=0", "trajectory.scorer=reward"], 2 * 3 * 2 * 2, 4 + 2 * 2),
}  # fmt: skip
BELOW = 0.30  # nothing is differentiated below the first adapter, nor with respect to latents (see test_picture_speed.py)


@pytest.mark.parametrize("setting", SETTINGS)
def test_rounds_cost_what_torch_counts(setting, tmp_path, capsys):
    """What the plan says of drawing is exact; of steps it says what the run says of them, which torch counts less of."""
    family, words, transitions, calls = SETTINGS[setting]
    words = [*SMALL, *words, "model=tiny-diffusion", f"model.path={tiny_pipelines.save(family, tmp_path / 'model')}"]
    plans, drawn, steps = [], [], []
    estimate, begin, step = plan_pictures.estimate, TrajectorySource._begin, Engine.step

    def counted(call, kept):
        def watched(self, *args):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = call(self, *args)
            kept.append((counter.get_total_flops(), result))
            return result
        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_pictures, "estimate", lambda *a: plans.append(estimate(*a)) or plans[-1])
        assert main(["plan", *[word for word in FAST if word != "debug=fast"], *words]) == 0
        patch.setattr(scorers, "judged", lambda reward, answers: list(range(len(answers))))  # of noise two rewards can be the same
        patch.setattr(TrajectorySource, "_begin", counted(begin, drawn))
        patch.setattr(Engine, "step", counted(step, steps))
        assert train(tmp_path / "run", *words) == 0
    (plan,), ((flops, _),) = plans, drawn
    assert plan.drawn == pytest.approx(flops)
    assert (plan.scene.rounds.pictures, plan.scene.rounds.calls, plan.scene.rounds.steps, plan.steps) == (12, calls, 2, 2)
    for flops, result in steps:
        assert result.effort.tokens == plan.work.tokens == transitions
        assert result.effort.executed == pytest.approx(plan.work.executed)
        assert -1e-3 < result.effort.executed / flops - 1 < BELOW
        assert 0 < result.effort.useful <= result.effort.executed
    said = re.sub(r"[ \n]+", " ", capsys.readouterr().out)
    for wanted in ("8 prompts; ", "1, each of 12 pictures (3 for each of 4 prompts), and 2 optimiser steps", "FLOPs per round",
                   f"12 pictures, {calls} forward passes each", "per round", "the drawing of a round", "latents of a round"):
        assert wanted in said
    assert "noise=pool" not in said and "new ones at each visit" not in said


def rounds(**changes) -> Rounds:
    trajectory = SimpleNamespace(steps=10, candidates=None, scorer="step_aware")
    source = SimpleNamespace(prompts=5, samples=4, epochs=2)
    train = SimpleNamespace(batch_size=2, steps=None, epochs=3)
    cfg = SimpleNamespace(trajectory=trajectory, source=source, train=train, sampler=SimpleNamespace(batch_size=8),
                          data=SimpleNamespace(pairs="best_worst"))
    return replace(Rounds(cfg, 11, range(4, 7), Guidance(2.0)), **changes)


def test_a_round_has_its_steps_and_its_rows():
    made = rounds()
    assert (made.steps, made.total, made.pictures, made.at_once) == (2 * 3, 7 * 6, 20, 2 * 8)
    assert len(made.rows("groups")) == 2 * 4 * 3 and len(made.rows("pairs")) == 2 * 1 * 3
    made.cfg.data.pairs = "all"
    assert len(made.rows("pairs")) == 2 * 6 * 3 and made.rows("pairs")[0].size("pairs", "draws") == (1, 2)
    made.cfg.trajectory.candidates = 3
    assert len(made.rows("pairs")) == 2 * 4 * 3 and made.calls == 2 * (10 + 3 * 3) and made.at_once == 2 * 24
    made.cfg.trajectory.steps = 7  # the last of the three ends with the picture, which is not foreseen
    assert made.calls == 2 * (7 + 3 * 2)
    alone = rounds(guidance=Guidance(1.0))
    assert (alone.calls, alone.at_once) == (10, 8)


def test_two_predictions_need_their_memory(tmp_path):
    """Graphs of both where both are trained; and while pictures are drawn both are made at once."""
    plans, estimate = [], plan_pictures.estimate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_pictures, "estimate", lambda *a: plans.append(estimate(*a)) or plans[-1])
        assert main(["plan", "hardware=cpu", *SMALL, "model=tiny-diffusion", f"model.path={tiny_pipelines.save('sd15', tmp_path)}",
                     "algo=ddpo", "model.guidance=1"]) == 0
    (one,) = plans
    held, both = (estimate(one.cfg, replace(one.scene, rounds=replace(one.scene.rounds, guidance=Guidance(2.5, trained))))
                  for trained in (False, True))
    assert both.memory.activations == pytest.approx(2 * one.memory.activations, rel=0.1)
    assert held.memory.activations == one.memory.activations
    for moment, more in (("a backward pass", (both, one)), ("the drawing of a round", (held, one))):
        assert more[0].memory.moments[moment] > more[1].memory.moments[moment]
    offered = [name for name, _ in plan_pictures.remedies(one.cfg, 1)]
    assert offered[:2] == ["sampler.batch_size=2", "sampler.batch_size=1"]
