"""Methods that score sequences beside a pair's own replies raise the true reward of what the policy writes.

A table knows no such sequences, so they cannot be shown on the bandit, as the others are: here the tiny language model is trained for a
moment on rows without label noise, and every held-out prompt is answered once before and once after.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from prefopt.config.compose import typed
from prefopt.report.estimators import interval
from prefopt.training.engine import learning_rate
from prefopt.training.setup import make_accelerator, set_up
from tests.unit.test_compose import composed

pytestmark = pytest.mark.usefixtures("tiny_lm")

ROWS, PROMPTS = 16, 256
SMALL = (f"train.batch_size={ROWS}", f"data.eval_limit={PROMPTS}", f"evaluation.prompts={PROMPTS}", f"sampler.batch_size={PROMPTS}",
         "evaluation.kl=false", "train.self_check=false", "reference.store=off", "hardware=cpu", "hardware.threads=1")
# Steps, and what differs from a method's defaults, which are for models a thousand times as large. At 40 steps
# rationale_po had lost its gain again.
METHODS = {
    "srpo": (40, "algo.alpha=0.25"),  # the generator, whose first replies are judged here, counts for more than the improver
    "t_reg": (40,),
    "rationale_po": (24,),
    "rationale_orpo": (40, "algo.gamma=0.1", "algo.lambda_=2.0"),
    # Alone it does not read the replies: as a part beside a preference loss.
    "rationale_nll": (24, "algo=mpo", "algo.parts=[{algo: dpo}, {algo: rationale_nll, weight: 0.001}]"),
    "spo_selfsup": (24,),
}


def prepared(slug: str, steps: int, *words: str):
    """A run before its first step, and its config. Samples alone are judged."""
    AcceleratorState._reset_state(True)
    algo = "mpo" if "algo=mpo" in words else slug
    cfg = composed(f"algo={algo}", *(w for w in words if w != "algo=mpo"), *SMALL, f"train.steps={steps}", f"data.limit={steps * ROWS}")
    cfg = typed(cfg, "train", algo)
    run = set_up(cfg, make_accelerator(cfg))
    run.judge.held_out = None
    return run, cfg


@cache
def before() -> np.ndarray:
    """True rewards [PROMPTS] of the samples of the model that every method starts from."""
    return prepared("dpo", 1)[0].judge.measure(0).replies["true_reward"]


def after(slug: str, steps: int, *words: str) -> np.ndarray:
    """True rewards [PROMPTS] of the samples after training, to the same prompts."""
    run, cfg = prepared(slug, steps, *words)
    for step in range(steps):
        assert not run.engine.step(run.source.step(step), learning_rate(step, steps, cfg.optim)).skipped
    return run.judge.measure(steps).replies["true_reward"]


@pytest.mark.parametrize("slug", METHODS)
def test_the_true_reward_rises(slug):
    start, end = before(), after(slug, *METHODS[slug])
    gain = interval(end - start, False)
    assert len(start) == len(end) == PROMPTS and gain.low > 0, f"{gain.mean:.2f} [{gain.low:.2f}, {gain.high:.2f}]"
