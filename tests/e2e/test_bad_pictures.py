"""Whatever is wrong with pictures, their models and their scorers: one sentence that names it, exit code 2, and not one training step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefopt.policies.denoisers import open_denoiser
from prefopt.tracking.tracker import read_jsonl
from tests.tiny_pipelines import ALL, folders
from tests.toy_runs import train


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return folders(tmp_path_factory)


@pytest.fixture
def said(folder, tmp_path, capsys):
    """Trains on three pairs that are as they should be but for what `spoil(folder)` does to the pictures of the second, or gives instead.
    Returns the sentence that refuses it."""

    def go(spoil=None, *words: str) -> str:
        generator = np.random.default_rng(0)
        for name in ("1a", "1b", "2a", "2b", "3a", "3b"):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        table = [{"prompt": "a red circle", "chosen": f"{n}a.png", "rejected": f"{n}b.png"} for n in (1, 2, 3)]
        table[1] |= (spoil(tmp_path) if spoil else None) or {}
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        model = [] if any(word.startswith("model.path") for word in words) else [f"model.path={folder('sd15')}"]
        capsys.readouterr()
        code = train(tmp_path / "run", "model=tiny-diffusion", *model, "model.resolution=16", "model.latent=[4,2]", "data=pictures",
                     f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_fraction=0", "algo=diffusion_dpo", "train.batch_size=2",
                     "train.steps=2", "evaluation.prompts=0", *words)
        err = capsys.readouterr().err
        sentences = [line for line in err.splitlines() if line.startswith("prefopt: ")]
        assert code == 2 and len(sentences) == 1 and err.splitlines()[-1] == sentences[0] and "Traceback" not in err, err
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert not metrics.exists() or all(row["split"] != "train" for row in read_jsonl(metrics))
        return sentences[0]

    return go


def unreadable(pictures: Path) -> None:
    (pictures / "2a.png").write_text("<html>404</html>")


def cut_off(pictures: Path) -> None:
    content = (pictures / "2b.png").read_bytes()
    (pictures / "2b.png").write_bytes(content[: len(content) // 2])


def printed(pictures: Path) -> dict:
    Image.new("CMYK", (16, 16)).save(pictures / "2a.jpg")
    return {"chosen": "2a.jpg"}


def small(pictures: Path) -> None:
    Image.new("RGB", (16, 12)).save(pictures / "2b.png")


def copied(pictures: Path) -> None:
    shutil.copy(pictures / "2a.png", pictures / "2b.png")


def converted(pictures: Path) -> dict:
    Image.open(pictures / "2a.png").save(pictures / "2b.bmp")
    return {"rejected": "2b.bmp"}


@pytest.mark.parametrize(("spoil", "words", "wanted"), [
    (unreadable, [], "2a.png: it is no readable image (16 bytes)"),
    (cut_off, [], "2b.png: it is damaged or cut off"),
    (printed, [], "2a.jpg: its channels are CMYK; only RGB"),
    (small, [], "2b.png: it has 16 x 12 pixels, less than the 16 x 16 it is used at; data.min_size=N"),
    (small, ["data.buckets=8", "data.min_size=14"], "2b.png: it has 16 x 12 pixels, and data.min_size is 14"),
    (copied, [], "2b.png have the same bytes"),
    (converted, [], "2b.bmp come to the same pixels"),
], ids=["unreadable", "cut off", "CMYK", "small", "small for buckets", "same bytes", "same pixels"])
def test_a_bad_picture_is_named_with_its_row(spoil, words, wanted, said):
    sentence = said(spoil, *words)
    assert "rows.jsonl row 2: " in sentence and wanted in sentence
    assert "set data.on_bad_row=skip" in sentence


def test_a_model_without_its_vae_is_named(folder, said, tmp_path):
    shutil.copytree(folder("sd15"), tmp_path / "model", ignore=shutil.ignore_patterns("vae"))
    sentence = said(None, f"model.path={tmp_path / 'model'}")
    assert f"{tmp_path / 'model'} has no vae, which a StableDiffusionPipeline needs" in sentence and "copy the vae of the model" in sentence


def test_an_adapter_of_another_architecture_is_named(folder, said, tmp_path):
    open_denoiser(folder("sdxl"), lora=ALL).save(tmp_path / "sdxl-lora")
    sentence = said(None, "adapter=lora", f"model.lora.adapter={tmp_path / 'sdxl-lora'}")
    assert str(tmp_path / "sdxl-lora") in sentence and "of another architecture" in sentence


@pytest.mark.parametrize(("words", "wanted"), [
    (["algo=online_diffusion_dpo", "reward=clip", "reward.path=./nowhere"], "reward.path=./nowhere: there is no such folder"),
    (["evaluation.prompts=2", "evaluation.rewards=[clip:./nowhere]"], "evaluation.rewards: clip:./nowhere: there is no such folder"),
], ids=["trained on", "held out"])
def test_a_scorer_that_is_not_there_is_named(words, wanted, said):
    assert wanted in said(None, *words)
