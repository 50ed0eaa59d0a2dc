"""What a run reads may come from anybody: weights, configs, rows, replies. None of it runs as code, and nothing secret is written.

Other tests hold the rest: a `_target_` outside of prefopt (test_bad_input.py, test_compose.py), image paths that lead out of the data's
folder (test_picture_sources.py), secrets in sweeps and trackers (test_trackers.py), and pages that escape what models and data say
(test_report.py, test_compare.py, test_picture_grid.py, test_token_rewards.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.errors import RunFailed
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from tests.toy_runs import FAST, train

BANDIT = ["model=bandit", "data=bandit"]


class Bomb:
    """Unpickled, it makes the file that it names."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """Is there as soon as foreign code has run."""
    return tmp_path / "foreign-code-has-run"


def test_the_bomb_goes_off_where_pickles_are_loaded(mark):
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.is_dir()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(run, *BANDIT) == 0
    return run


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_checkpoint_is_refused(name, how, finished, mark, tmp_path, capsys):
    """With checksums that fit: who can write the one can write the other."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "status.json").write_text(json.dumps({"state": "running"}))
    for folder in checkpoint.steps(run / "checkpoints"):
        if how == "pickle":
            (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
        else:
            torch.save({"weights": Bomb(mark)}, folder / name)
        state = json.loads((folder / "state.json").read_text())
        state["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state))
    for words in (["train", *BANDIT, *FAST, f"hydra.run.dir={run}"], ["eval", f"run={run}"]):
        capsys.readouterr()
        assert main(words) == 2
        assert "is damaged" in capsys.readouterr().err.splitlines()[-1]
    assert not mark.exists()


def test_a_pickle_in_place_of_an_adapter_is_refused(mark, tmp_path, tiny_lm, capsys):
    assert train(tmp_path / "first", "model=tiny-lm-lora", "evaluation.prompts=0") == 0
    adapter = tmp_path / "first" / "model"
    shutil.copytree(adapter, tmp_path / "adapter")
    (weights,) = (tmp_path / "adapter").glob("*.safetensors")
    torch.save({**load_file(weights), "x": Bomb(mark)}, tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    capsys.readouterr()
    assert train(tmp_path / "run", "model=tiny-lm-lora", f"model.lora.adapter={tmp_path / 'adapter'}") == 2
    assert "has its weights in adapter_model.bin, a pickle" in capsys.readouterr().err.splitlines()[-1]
    assert not mark.exists() and not (tmp_path / "run").exists()


def with_code(folder: Path, tiny_lm: Path, mark: Path) -> Path:
    """A model folder that brings its own Python."""
    shutil.copytree(tiny_lm, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\nclass OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    return folder


def test_a_models_own_code_runs_only_where_it_is_asked_for(mark, tmp_path, tiny_lm, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tmp_path / "model", tiny_lm, mark)
    words = [f"model.path={folder}", "evaluation.prompts=0"]
    assert train(tmp_path / "run", *words) == 2
    assert "wants to run its own Python code; allow it with trust.remote_code=true" in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "run").exists()
    train(tmp_path / "run", *words, "trust.remote_code=true")
    assert mark.is_dir()


HYDRA = {
    "callback": {"callbacks": {"x": {"_target_": "foreign.Code"}}},
    "sweeper": {"sweeper": {"_target_": "foreign.Code"}},
    "logging": {"job_logging": {"version": 1, "handlers": {"x": {"()": "foreign.Code"}}, "root": {"handlers": ["x"]}}},
    "logging of hydra": {"hydra_logging": {"version": 1, "handlers": {"x": {"()": "foreign.Code"}}, "root": {"handlers": ["x"]}}},
    "class": {"job_logging": {"version": 1, "handlers": {"x": {"class": "foreign.Code"}}, "root": {"handlers": ["x"]}}},
    "eval": {"job_logging": {"version": 1, "handlers": {"x": {"class": "logging.config.fileConfig", "fname": "x.ini"}}}},
}


@pytest.mark.parametrize("kind", HYDRA)
@pytest.mark.parametrize("more", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_a_config_group_of_somebody_else_runs_no_code(kind, more, mark, tmp_path, monkeypatch, capsys):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "foreign.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n\n\ndef Code(**settings):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\n" + yaml.safe_dump({"hydra": HYDRA[kind]})
    (tmp_path / "conf" / "experiment" / "nice.yaml").write_text(text)
    words = ["train", "--config-dir", str(tmp_path / "conf"), "experiment=nice", *BANDIT, *more, f"hydra.run.dir={tmp_path / 'run'}",
             f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("prefopt: hydra.") and "would run code that is neither prefopt's nor Hydra's" in said
    assert not mark.exists() and not (tmp_path / "run").exists() and not (tmp_path / "sweep").exists()


def test_a_run_that_fails_writes_no_secret(tmp_path, monkeypatch, capsys):
    """Errors of clients name what they were called with: a URL with a password, a header with a token."""
    token = "hf_" + "AbCdEfGhIj" * 3
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("JUDGE_API_KEY", "plain-looking-value")
    said = f"GET https://me:urlpassw0rd@host/x refused Authorization: Bearer abc.def-ghi; tried {token} and plain-looking-value"

    def stepping(self, *args, **kwargs):
        raise RunFailed(said)

    monkeypatch.setattr(Engine, "step", stepping)
    run = tmp_path / "run"
    assert train(run, *BANDIT, f"trust.packages=[{token}]") == 1
    files = [f for f in run.rglob("*") if f.is_file()]
    assert {"status.json", "report.html", "config.yaml", "manifest.json"} <= {f.name for f in files}
    for secret in (token, "urlpassw0rd", "abc.def-ghi", "plain-looking-value"):
        assert not [f.name for f in files if secret.encode() in f.read_bytes()], secret
    assert "refused" in json.loads((run / "status.json").read_text())["message"]
