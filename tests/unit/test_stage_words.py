"""What a config says of stages: their settings as words, their folders as references, and what is left of a config without them."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from prefopt.config.stages import as_references, quote, stage_folder, without_stages, words


@pytest.mark.parametrize("value", [
    1, -0.5, 1e-7, True, False, None, "dpo", "tiny-lm", "a b", "/some/where, else", "it's", "null", "1e5", "back\\slash\\", "[x]", "$x",
    [1, "a b", None], [{"algo": "dpo", "weight": 0.8}], "",
])  # fmt: skip
def test_hydra_reads_each_setting_as_it_was(value):
    [word] = words({"a": {"b": value}})
    assert word.startswith("++a.b=")
    parsed = OverridesParser.create().parse_override(word)
    read = parsed.value()
    assert read == value and type(read) is type(value)


def test_groups_are_chosen_and_keys_are_set():
    assert words({"algo": "sft", "optim": {"lr": 1e-5, "warmup": 0}, "algo.beta": 0.1}) == [
        "algo=sft", "++optim.lr=1e-05", "++optim.warmup=0", "++algo.beta=0.1"]  # fmt: skip
    assert words({"data": {"transforms": {"swap": {}}}}) == ["++data.transforms.swap={}"], "it has no settings, and it is a transform"
    assert words({}) == [] and quote("it's") == "'it\\'s'"


def test_folders_of_stages_are_kept_as_references():
    """Wherever the run then lies. Files inside a stage's folder, and other runs' stages, are paths like any other."""
    run = "/runs/mine"
    plain = {"a": stage_folder(run, "sft"), "b": ["/runs/mine/stages/dpo", 3], "c": "/runs/mine/stages/sft/model", "d": "/x/stages/sft"}
    kept = as_references(plain, run)
    assert kept == {**plain, "a": "${stage:sft}", "b": ["${stage:dpo}", 3]}
    assert OmegaConf.to_container(OmegaConf.create({**kept, "run_dir": "/moved"}), resolve=True)["b"] == ["/moved/stages/dpo", 3]


def test_a_config_without_its_stages():
    transforms = {"score": {"path": "${stage:reward}"}, "margin": {"scale": 1.0}}
    config = {"stages": {"sft": {"algo": "sft"}}, "teacher": {"path": "${stage:dpo}"}, "empty": {}, "none": None, "seed": 0,
              "data": {"transforms": transforms}, "rows": [{"path": "${ stage : x }"}, 1]}
    assert without_stages(config) == {"empty": {}, "none": None, "seed": 0, "rows": [{}, 1],
                                      "data": {"transforms": {"score": {}, "margin": {"scale": 1.0}}}}
