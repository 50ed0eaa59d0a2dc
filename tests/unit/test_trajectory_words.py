"""What composition refuses about trajectories: one clear sentence, exit code 2, before anything is loaded."""

from __future__ import annotations

import pytest

from tests.toy_runs import train
from tests.unit.test_compose import composed

FLOW = ["algo=flow_grpo", "model=tiny-flow"]


@pytest.mark.parametrize(("words", "says"), [
    ([*FLOW, "trajectory.window=[4,12]"], "trajectory.window=[4,12] is outside the schedule of 10 steps (trajectory.steps)"),
    ([*FLOW, "trajectory.window=[2,5]", "trajectory.window_size=4"], "trajectory.window_size=4 is more than the 3 steps of the window"),
    ([*FLOW, "source.samples=1"], "source.samples=1: it must be at least 2: one reply alone is neither better nor worse"),
    (["algo=spo_diffusion", "model=tiny-diffusion", "trajectory.candidates=null"], "source.samples=1: it must be at least 2"),
    ([*FLOW, "trajectory.early=0"], "trajectory.early=0.0: it must be in (0, 1]"),
    ([*FLOW, "trajectory.guidance=4.5"], "drawn and trained with a guidance of 4.5, and samples are evaluated with 3.5"),
    ([*FLOW, "sampler.guidance=1"], "drawn and trained with a guidance of 3.5, and samples are evaluated with 1"),
    ([*FLOW, "source=offline"], "source=offline does not fit: FlowGRPO learns from the steps of the sampler; use source=trajectories"),
    (["algo=flow_grpo"], "FlowGRPO is about the denoising errors of pictures, and model=tiny-lm makes none"),
    (["algo=dpo", "source=trajectories"], "learns from the steps of a diffusion model's sampler, and model=tiny-lm has none"),
    (["algo=diffusion_kto", "model=tiny-diffusion", "source=trajectories"], "reads more than those of a pair; choose flow_grpo"),
    (["algo=diffusion_dpo", "model=tiny-diffusion", "trajectory.steps=5"], "trajectory.steps=5 is for source=trajectories"),
    ([*FLOW, "trajectory.candidates=4"], "trajectory.candidates=4 makes pairs at each step, and FlowGRPO reads no pairs"),
    ([*FLOW, "trajectory.noise=0"], "trajectory.noise=0.0: it must be above 0: steps without noise have no log-prob"),
    ([*FLOW, "reward=none"], "source=trajectories needs a reward for what the policy writes"),
])
def test_what_cannot_work_is_said(words, says, tmp_path, capsys):
    assert train(tmp_path, *words) == 2
    assert says in capsys.readouterr().err


def test_one_picture_of_a_prompt_is_enough_where_its_candidates_are_compared(tmp_path, capsys):
    """The next thing that is wrong is said."""
    assert train(tmp_path, "algo=spo_diffusion", "model=tiny-diffusion", "source.samples=1", "trajectory.window=[9,99]") == 2
    assert "trajectory.window=[9,99]" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "rate"), [(FLOW, 1.8e-3), ([*FLOW, "adapter=lora"], 6e-4), ([*FLOW, "optim.lr=1e-5"], 1e-5),
                                             (["algo=ddpo", "model=sd15"], 3e-4)])
def test_adapters_of_trajectories_go_at_three_times_the_rate(words, rate):
    assert composed(*words).optim.lr == pytest.approx(rate)


def test_guidance_may_differ_where_that_is_declared(tmp_path, capsys):
    """Then the next thing that is wrong is said."""
    assert train(tmp_path, *FLOW, "trajectory.guidance=4.5", "trajectory.guidance_differs=true", "trajectory.window=[9,99]") == 2
    assert "trajectory.window=[9,99]" in capsys.readouterr().err
