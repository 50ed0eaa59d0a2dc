"""Fixtures shared by all tests. The tiny language model is made once and kept in the user's cache, as for a user."""

from __future__ import annotations

import gc
import io
import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported, so a fixture comes too late
# A config is made of thousands of objects; by default a tenth of the time would go into looking through them.
gc.set_threshold(50_000, 20, 100)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or else deepspeed says on stdout, when it is imported, that there is no GPU


@pytest.fixture(scope="session")
def tiny_lm():
    from prefopt.policies.tiny_lm import ensure_tiny_lm

    return ensure_tiny_lm(progress=False)


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory):
    """Tests neither read nor fill the user's store. One for all tests of a process: what was stored once has the same bits in each run."""
    os.environ["PREFOPT_STORE"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session", autouse=True)
def _quick_collection():
    """What the libraries made when they were imported lives to the end; without this each collection looks through all of it."""
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_hydra():
    """Hydra parses every file anew for each composition, and composes twice, only to look for `hydra.mode`: most of a command."""
    from hydra._internal.hydra import Hydra
    from omegaconf import OmegaConf

    real, mode, parsed = OmegaConf.load, Hydra.get_mode, {}

    def load(file):
        if not hasattr(file, "read"):
            return real(file)
        text = file.read()
        if text not in parsed:
            parsed[text] = OmegaConf.to_container(real(io.StringIO(text)))
        return OmegaConf.create(parsed[text])

    def get_mode(self, config_name, overrides):
        return mode(self, config_name, overrides) if any("hydra.mode" in word for word in overrides) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(load))
        patch.setattr(Hydra, "get_mode", get_mode)
        yield


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """No test reaches a hub or a tracker, or leaves runs where it was started."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
