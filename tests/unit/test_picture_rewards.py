"""Rewards of pictures that no network computes, and which rewards a config may ask for."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prefopt.config.rounds import check_picture_rewards
from prefopt.config.schema import DataConfig, EvaluationConfig, RewardConfig
from prefopt.errors import UserError
from prefopt.rewards.true_reward import make_rewards
from tests.unit.test_compose import refusal
from tests.unit.test_scorers import example, pictures


@pytest.mark.parametrize(("overrides", "said"), [
    (("reward=clip",), "reward=clip judges pictures, and data=tiny-feedback holds texts"),
    (("data=tiny-pictures", "model=tiny-diffusion", "reward=flr"), "reward=followup judges texts, and data=tiny-pictures holds pictures"),
    (("data=tiny-pictures", "model=tiny-diffusion", "reward=hpsv2"), "reward.path has no value, and reward=hpsv2 needs one"),
    (("data=tiny-pictures", "model=tiny-diffusion", "reward=brisque", "reward.path=x"), "reward.path=x is read with reward=model only"),
    (("data=tiny-pictures", "model=tiny-diffusion", "evaluation.rewards=[clp]"), "aesthetic, brisque); did you mean 'clip'?"),
])  # fmt: skip
def test_rewards_that_do_not_fit_the_data_are_refused_at_composition(overrides, said):
    assert said in refusal(*overrides)


HELD_OUT = {  # what is asked for beside reward=brisque, and what is said
    "clip": "clip needs the folder or hub id of its model; write clip:FOLDER_OR_HUB_ID",
    "harmonic:x": "harmonic is none of the rewards of pictures that need no settings",
    "brisque": "brisque is there already as reward=brisque; leave it out", "brisque:x": "takes no path; write brisque",
    "clip:a clip:b": "clip is there already; leave it out",
}


@pytest.mark.parametrize(("asked", "said"), HELD_OUT.items(), ids=HELD_OUT)
def test_held_out_rewards_that_are_none_are_refused(asked, said):
    cfg = SimpleNamespace(reward=RewardConfig("brisque"), evaluation=EvaluationConfig(rewards=asked.split()),
                          data=SimpleNamespace(pictures=True, name="mine"))
    with pytest.raises(UserError, match=said):
        check_picture_rewards(cfg)


def test_held_out_rewards_judge_samples_of_pictures():
    def check(shown, prompts):
        check_picture_rewards(SimpleNamespace(reward=RewardConfig(), evaluation=EvaluationConfig(prompts=prompts, rewards=["clip:a/b"]),
                                              data=SimpleNamespace(pictures=shown, name="mine")))

    check(True, 4)
    for shown, prompts, said in ((False, 4, "data=mine holds texts"), (True, 0, "evaluation.prompts=0 asks for none")):
        with pytest.raises(UserError, match=said):
            check(shown, prompts)


def test_the_known_reward_of_a_world_of_pictures():
    from prefopt.data import tiny_pictures

    rewards = make_rewards(RewardConfig(), DataConfig(name="tiny-pictures", source="tiny_pictures"))
    caption = tiny_pictures.captions("eval")[0]
    plain = Image.new("RGB", (tiny_pictures.SIZE, tiny_pictures.SIZE), "white")
    drawn = pictures()[0].resize(plain.size)
    assert list(rewards) == ["true_reward"]
    wanted = [tiny_pictures.true_reward(caption, image) for image in (plain, drawn)]
    assert rewards["true_reward"]([example(caption, plain), example(caption, drawn)]) == wanted


class Package:
    """What the package brisque does: a number from features, some of which are arrays of one number."""

    def __init__(self, url):
        assert url is False

    def scale_features(self, features):
        return [float(f) for f in features]

    def score(self, image):
        mean = float(image.mean())
        return math.nan if image.std() == 0 else sum(self.scale_features([np.array([mean]), 1.0]))


def test_brisque_is_turned_round_and_kept_in_its_range(monkeypatch):
    monkeypatch.setitem(sys.modules, "brisque", SimpleNamespace(BRISQUE=Package))
    reward = make_rewards(RewardConfig("brisque"), DataConfig(name="mine", source="files"))["reward"]
    dark = np.zeros((4, 4, 3), np.uint8)
    dark[0, 0] = 48  # a mean of 3
    bright = np.full((4, 4, 3), 200, np.uint8)
    bright[0, 0] = 0
    shown = [Image.fromarray(x) for x in (dark, bright)] + [Image.new("RGB", (4, 4), "red").convert("L").convert("RGB")]
    assert reward([example("any", image) for image in shown]) == [-4.0, -100.0, -100.0]


def test_brisque_names_its_package_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "brisque", None)
    with pytest.raises(UserError, match=r"pip install 'prefopt\[brisque\]'"):
        make_rewards(RewardConfig("brisque"), DataConfig(name="mine", source="files"))
