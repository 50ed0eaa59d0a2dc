"""Whole runs of diffusion models, in process: resumed to the same bits, the reference's scores stored, started from another run."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prefopt.cli import main
from prefopt.config.schema import DataConfig, LoraConfig, ReferenceConfig
from prefopt.data import tiny_pictures
from prefopt.data.records import Example, Message
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.encoders import Encoders
from prefopt.policies.lora_export import matrices
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from prefopt.training.moving import WeightAverage
from prefopt.training.reference import identity_of
from tests import toy_denoising as toy
from tests.tiny_pipelines import save
from tests.toy_runs import train
from tests.unit.test_diffusion_policy import LORA, moved
from tests.unit.test_moving_reference import weights

COMMON = ["model=tiny-diffusion", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=12", "data.eval_limit=4",
          "train.batch_size=4", "train.steps=5", "train.eval_every=5", "train.save_every=1", "evaluation.prompts=0", "optim.warmup=0"]
LORA_WORDS = ["adapter=lora", "model.lora.r=2", "model.lora.alpha=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("sd15", tmp_path_factory.mktemp("pipeline") / "sd15")


@pytest.fixture
def run(folder, tmp_path):
    def go(name: str, *words: str) -> int:
        return train(tmp_path / name, f"model.path={folder}", *COMMON, *words)

    return go


def killed_before(step: int):
    """In place of `Engine.step`: the process dies where it would make optimiser step `step` (from 1)."""
    real, calls = Engine.step, []

    def stepping(self, *args):
        calls.append(1)
        if len(calls) == step:
            raise SystemError("killed")
        return real(self, *args)

    return stepping


def rows(folder: Path, split: str = "train") -> list[dict]:
    return [r for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == split]


@pytest.mark.parametrize("words", [
    ["algo=diffusion_dpo", "train.ema=0.9", "noise.draws=2"],
    ["algo=ddim_inpo", "noise.inversion_steps=3", *LORA_WORDS, "train.ema=0.9"],
], ids=["full", "lora-inverted"])
def test_trap_4_24_a_killed_run_goes_on_to_the_same_bits(words, run, tmp_path, monkeypatch):
    """Weights, moments, their average, and what was logged; the rows go round more than once, so draws of later visits are in it."""
    assert run("whole", *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", killed_before(4))
        with pytest.raises(SystemError):
            run("run", *words)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000003"
    real, made = Engine.step, []
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", lambda self, *args: (made.append(1), real(self, *args))[1])
        assert run("run", *words) == 0
    assert len(made) == len(rows(tmp_path / "whole")) - 3, "it went on behind step 3 and did not begin anew"
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    own, average = ({n.split(" ", 1)[1]: t for n, t in whole.items() if n.startswith(kind)} for kind in ("weights", "ema"))
    assert own.keys() == average.keys() and not all(torch.equal(own[name], average[name]) for name in own)
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [r["loss"] for r in rows(tmp_path / "run")]
    assert rows(tmp_path / "whole", "eval")[-1]["loss"] == rows(tmp_path / "run", "eval")[-1]["loss"]


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-6), ("bf16", 5e-3)])
def test_trap_4_4_stored_scores_leave_the_first_margin_at_zero(precision, rounding, run, tmp_path):
    assert run("run", "algo=diffusion_dpo", "noise.pool=3", "reference.store=on", f"hardware.precision={precision}") == 0
    assert rows(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(math.log(2), abs=rounding)


@pytest.mark.parametrize("what", ["weights", "adapter"])
def test_trap_4_25_a_run_does_not_go_on_against_another_reference(what, folder, tmp_path, monkeypatch, capsys):
    """What it began with is read anew when it goes on, and may have been written over since."""
    model, adapter = shutil.copytree(folder, tmp_path / "model"), tmp_path / "adapter"
    toy.policy(folder, lora=LORA).save(adapter)
    words = [f"model.path={model}", *COMMON, "algo=diffusion_dpo", *LORA_WORDS, f"model.lora.adapter={adapter}", "train.steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", killed_before(2))
        with pytest.raises(SystemError):
            train(tmp_path / "run", *words)
    (file,) = (adapter.glob("*.safetensors") if what == "adapter" else (model / "unet").glob("*.safetensors"))
    kept = file.read_bytes()
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert train(tmp_path / "run", *words) == 2
    said = capsys.readouterr().err
    assert "began with other weights than those that are now at" in said and (str(adapter) in said) == (what == "adapter")
    file.write_bytes(kept)
    assert train(tmp_path / "run", *words) == 0


def test_the_average_is_what_is_saved_and_judged(run, tmp_path):
    """A run with an average trains as one without; its model and its held-out loss are the average's."""
    assert run("plain", "algo=diffusion_dpo", "optim.lr=1e-2") == 0
    assert run("average", "algo=diffusion_dpo", "optim.lr=1e-2", "train.ema=0.99") == 0
    plain, average = tmp_path / "plain", tmp_path / "average"
    assert [r["loss"] for r in rows(plain)] == [r["loss"] for r in rows(average)]
    (first, *_, last), (first_average, *_, last_average) = rows(plain, "eval"), rows(average, "eval")
    assert first["loss"] == first_average["loss"] and last["loss"] != last_average["loss"]
    held = {n.removeprefix("ema network."): t for n, t in weights(average).items() if n.startswith("ema")}
    (file,) = (average / "model" / "unet").glob("*.safetensors")
    saved = load_file(file)
    assert all(torch.equal(saved[name], held[name]) for name in held) and len(held) == len(saved)


def test_stored_scores_are_live_ones_and_a_second_run_computes_none(run, tmp_path, capsys):
    said = re.compile(r"reference: stored \((\d+) of (\d+) replies were there\)")
    words = ["algo=diffusion_dpo", "algo.beta=1.0", "noise.pool=3", "noise.draws=2", "noise.dropout=0.3"]
    assert run("live", *words, "reference.store=off") == 0
    capsys.readouterr()
    found = []
    for name in ("first", "second"):
        assert run(name, *words, "reference.store=on", "seed=1" if name == "second" else "seed=0") == 0
        found.append(tuple(map(int, said.search(capsys.readouterr().err).groups())))
    assert found[0][0] == 0 and found[1] == (found[0][1], found[0][1]) and found[0][1] > 0
    for live, stored in zip(rows(tmp_path / "live"), rows(tmp_path / "first"), strict=True):
        assert stored["loss"] == pytest.approx(live["loss"], abs=1e-5)
        assert stored["reward/margin"] == pytest.approx(live["reward/margin"], abs=1e-4)


def test_scores_of_mirrored_pictures_are_stored_apart(folder):
    """Under data.flip half of a pool's draws show the mirror image, under the same address."""
    policy, found = toy.policy(folder, {"pool": 2}), []
    for flip in (False, False, True):
        data = DataConfig(name="mine", source="files", flip=flip)
        found.append(identity_of(SimpleNamespace(model=policy.cfg, reference=ReferenceConfig(), data=data), policy))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("words", [[], LORA_WORDS], ids=["full", "lora"])
def test_a_run_starts_where_another_ended(words, run, tmp_path, capsys):
    """Its reference too: the loss starts at ln 2 again, and held-out pictures are scored as they were at the end."""
    assert run("first", "algo=diffusion_dpo", "optim.lr=1e-2", *words) == 0
    assert run("second", "algo=diffusion_dpo", f"model.start={tmp_path / 'first'}", *words) == 0
    (fresh, *_, end), start = rows(tmp_path / "first", "eval"), rows(tmp_path / "second", "eval")[0]
    assert start["logp/chosen"] == pytest.approx(end["logp/chosen"], rel=1e-6)
    assert start["logp/chosen"] != pytest.approx(fresh["logp/chosen"], rel=1e-5)
    assert start["loss"] == pytest.approx(0.693147, abs=1e-6)
    if words:
        assert run("third", "algo=diffusion_dpo", f"model.start={tmp_path / 'first'}") == 2
        assert "add adapter=lora" in capsys.readouterr().err


def test_inversion_dpo_trains_from_an_adapter_against_the_base(run, tmp_path):
    assert run("first", "algo=diffusion_dpo", "optim.lr=1e-2", *LORA_WORDS) == 0
    words = ["algo=inversion_dpo", "noise.inversion_steps=4", "noise.draws=2", "algo.beta=1.0", *LORA_WORDS]
    assert run("second", *words, f"model.start={tmp_path / 'first'}", "reference.policy=base") == 0
    assert all(r["grad_norm"] > 1e-4 and abs(r["loss"] - 0.693147) > 1e-6 for r in rows(tmp_path / "second"))


# ---- the average by itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_trap_4_22_weights_are_back_bit_for_bit(folder, lora):
    policy = toy.policy(folder, lora=lora)
    average = WeightAverage(policy, 0.5)
    moved(policy, 0.1)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    micro = toy.micro(policy, toy.rows(policy, 2))
    own = policy(micro)["token_logp"].detach()
    with pytest.raises(ZeroDivisionError), average.active():
        assert all(torch.equal(p, average.weights[name]) for name, p in policy.trainable().items())
        assert not torch.equal(policy(micro)["token_logp"], own)
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in policy.trainable().items())
    assert torch.equal(policy(micro)["token_logp"], own)


def test_an_average_follows_faster_at_first(folder):
    policy = toy.policy(folder, lora=LORA)
    average = WeightAverage(policy, 0.3)
    name, parameter = next(iter(policy.trainable().items()))
    wanted = parameter.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3), (4, 0.3)):
        moved(policy, 0.1, seed=step)
        average.refresh(step)
        wanted = decay * wanted + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.weights[name], wanted)
    again = WeightAverage(policy, 0.3)
    again.load({n: t.clone() for n, t in average.state().items()})
    moved(policy, 0.1)
    for one in (average, again):
        one.refresh(5)
    assert all(torch.equal(average.weights[n], again.weights[n]) for n in average.weights)


@pytest.mark.parametrize("words", [
    ["algo=sft"], ["algo=mpo", "algo.parts=[{algo: sft, weight: 1.0}, {algo: dpo, weight: 0.0}]"],
], ids=["alone", "part"])
def test_plain_fine_tuning_is_the_mean_score_of_the_pictures(words, run, tmp_path):
    """Not of their draws, of which there are several: each of these is 1/m of its picture's score."""
    assert run("sft", *words, "noise.draws=3", "optim.lr=1e-2") == 0
    logged = rows(tmp_path / "sft")
    key = "logp/demonstrations" if "logp/demonstrations" in logged[0] else "logp/chosen"
    assert [r["loss"] for r in logged] == pytest.approx([-r[key] for r in logged], rel=1e-5)
    (before, *_, after) = rows(tmp_path / "sft", "eval")
    assert after["logp/chosen"] > before["logp/chosen"]


def test_of_a_ranking_what_is_trained_on_is_encoded(run, tmp_path, capsys):
    """The best and the worst of each of twelve rows of five; the four held-out rows are judged whole."""
    words = ["algo=diffusion_dpo", "data.completions=5", "evaluation.kl=false"]
    seen = {}
    for name, extra in (("pairs", []), ("all", ["data.pairs=all"])):
        capsys.readouterr()
        assert run(name, *words, *extra) == 0
        seen[name] = int(re.search(r"images: (\d+) ", capsys.readouterr().err)[1])
    assert seen == {"pairs": 12 * 2 + 4 * 5, "all": 16 * 5}
    assert main(["eval", f"run={tmp_path / 'pairs'}"]) == 0
    assert "kendall_tau" in (tmp_path / "pairs" / "eval.json").read_text()


def test_the_lora_of_a_run_is_exported(run, folder, tmp_path, capsys):
    """What is written changes the network as the run's own adapter does, in each program's keys."""
    assert run("lora", "algo=diffusion_dpo", "optim.lr=1e-2", *LORA_WORDS) == 0

    def change(adapter: Path) -> dict[str, torch.Tensor]:
        network = open_denoiser(folder, lora=LoraConfig(enabled=True, adapter=str(adapter))).network
        return {name: up @ down for name, (down, up) in matrices(network).items()}

    ours = change(tmp_path / "lora" / "model")
    assert max(float(matrix.abs().max()) for matrix in ours.values()) > 1e-3
    for style, key in (("diffusers", "unet.down_"), ("kohya", "lora_unet_down_"), ("comfyui", "lora_unet_down_")):
        file = tmp_path / f"{style}.safetensors"
        assert main(["export", str(tmp_path / "lora"), f"style={style}", f"output={file}"]) == 0
        assert any(name.startswith(key) for name in load_file(file))
        theirs = change(file)
        assert theirs.keys() == ours.keys()
        assert all(torch.allclose(theirs[name], ours[name], atol=1e-6) for name in ours)
    capsys.readouterr()
    for words, said in (
        (["style=kohya", f"output={file}"], "exists already"), (["style=koyha", "output=x.safetensors"], "did you mean 'kohya'?"),
        (["style=kohya", "output=x.bin"], "is no safetensors file"), (["style=kohya"], "prefopt export needs output=..."),
        (["stile=kohya"], "did you mean 'style'?"), ([str(folder), "style=kohya", "output=x.safetensors"], "takes one run, not 2"),
    ):
        assert main(["export", str(tmp_path / "lora"), *words]) == 2
        assert said in capsys.readouterr().err


def test_a_run_without_lora_is_not_exported(run, tmp_path, capsys):
    assert run("full", "algo=diffusion_dpo", "train.steps=1") == 0
    assert train(tmp_path / "text", "algo=dpo", "model=bandit", "data=bandit", "train.steps=1") == 0
    capsys.readouterr()
    for name, said in (("full", "was trained without a LoRA adapter, and style=kohya"), ("text", "is no diffusion model")):
        assert main(["export", str(tmp_path / name), "style=kohya", f"output={tmp_path / 'x.safetensors'}"]) == 2
        assert said in capsys.readouterr().err


def test_kto_with_buckets_mismatches_pictures_of_one_shape(run, tmp_path, capsys):
    """Rows of a shape take pictures of one another. A shape that one row has goes without, which is said."""
    sizes = [(32, 32)] * 4 + [(48, 24)] * 4 + [(24, 48)]
    generator, table = np.random.default_rng(0), []
    for number, (width, height) in enumerate(sizes):
        for side in "ab":
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{number}{side}.png")
        table.append({"prompt": f"caption {number}", "chosen": f"{number}a.png", "rejected": f"{number}b.png"})
    for name, lines in (("train", table), ("held", table[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["data=pictures", f"data.path={tmp_path}", "data.train=train.jsonl", "data.eval=held.jsonl", "data.buckets=8",
             "model.resolution=16", "evaluation.kl=false"]
    assert run("kto", "algo=kto", *words) == 0
    assert "data: 1 train rows without mismatched reply" in capsys.readouterr().err
    logged = rows(tmp_path / "kto")
    assert all(r["kl_estimate"] >= 0 for r in logged) and logged[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert len({r["kl_estimate"] for r in logged}) > 1


@pytest.fixture
def long_captions(tmp_path, monkeypatch):
    """Words for runs over pictures of which three captions have 15 words, one more than the text encoder reads. The store is empty."""
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    generator, table = np.random.default_rng(0), []
    for number in range(6):
        for side in "ab":
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{number}{side}.png")
        caption = " ".join(["red"] * (15 if number < 2 else 14) + ["circle"] * (number % 2))
        table.append({"prompt": caption, "chosen": f"{number}a.png", "rejected": f"{number}b.png"})
    for name, lines in (("train", table), ("held", table[-2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["algo=diffusion_dpo", "data=pictures", f"data.path={tmp_path}", "data.train=train.jsonl", "data.eval=held.jsonl",
            "train.steps=1"]


def test_captions_that_are_cut_are_told_in_every_run(run, long_captions, tmp_path, monkeypatch, capsys):
    """Also where nothing is encoded any more; in one line, with their total, which is in the manifest too."""
    warned = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda said, *_: warned.append(said))
    for name, stored in (("first", 0), ("second", 5)):
        assert run(name, *long_captions) == 0
        said = capsys.readouterr().err
        assert f"captions: 5 ({stored} were stored)" in said, "the empty one among them"
        assert said.count("captions: 3 of 4 captions are longer than 16 tokens and are cut") == said.count("are cut") == 1
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["data"]["captions"] == {"distinct": 4, "cut": 3, "limit": 16}
    assert not warned


def test_one_process_of_many_tells_of_captions_that_are_cut(folder, capsys):
    policy = toy.policy(folder)
    example = Example(prompt=[Message("user", [{"type": "text", "text": "red " * 15}])], completions=[], kind="prompt")
    for main_process in (True, False):
        policy.encode([example], DataConfig(name="mine", source="files"),
                      SimpleNamespace(is_main_process=main_process, process_index=int(not main_process), num_processes=1))
        assert ("1 of 1 captions are longer" in capsys.readouterr().err) == main_process


def test_a_second_run_over_a_filled_store_loads_neither_vae_nor_text_encoder(run, long_captions, monkeypatch):
    """Though some of its captions are too long, which is counted."""
    assert run("first", *long_captions) == 0

    def refuse(self):
        raise AssertionError("everything is stored")

    for part in ("vae", "texts"):
        monkeypatch.setattr(Encoders, part, property(refuse))
    assert run("second", *long_captions, "train.steps=2") == 0
    with pytest.raises(AssertionError, match="everything is stored"):
        run("third", *long_captions, "data.flip=true")


# ---- rounds ---------------------------------------------------------------------------------------------


ROUNDS = ["train.batch_size=2", "source.prompts=4", "source.epochs=2", "sampler.steps=3"]  # four steps to a round


@pytest.mark.parametrize("words", [
    ["algo=online_diffusion_dpo", "source.samples=3"],
    ["algo=diffusion_dro", "algo.margin=1", "optim.lr=1e-2", *LORA_WORDS],
    ["algo=seppo", "reference.every=2", *LORA_WORDS],
    ["algo=sail_diffusion", "source.samples=2", "source.mix=0.5"],
    ["algo=gradspo", "trajectory.steps=4", "trajectory.window=[2,3]", "trajectory.threshold=0"],  # drawn by an average of the policy
], ids=["rewarded", "states", "past", "self-rewarding", "gradspo"])
def test_a_run_killed_in_the_middle_of_a_round_goes_on_to_the_same_bits(words, run, tmp_path, monkeypatch):
    """Killed before step 8 of rounds of four: the second round is on disk with its latents, and the policy is no longer who drew it."""
    words = [*words, *ROUNDS, "train.steps=9", "train.eval_every=9", "train.save_every=3"]
    assert run("whole", *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", killed_before(8))
        with pytest.raises(SystemError):
            run("run", *words)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000006"
    assert run("run", *words) == 0
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [r["loss"] for r in rows(tmp_path / "run")]
    made = [sorted(p.name for p in (tmp_path / f / "rounds").iterdir()) for f in ("whole", "run")]
    assert made[0] == made[1] and sum(name.endswith(".jsonl") for name in made[0]) == 3


def test_latents_of_a_round_that_are_gone_are_named(run, tmp_path, monkeypatch, capsys):
    words = ["algo=online_diffusion_dpo", *ROUNDS, "train.steps=3"]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", killed_before(3))
        with pytest.raises(SystemError):
            run("run", *words)
    (tmp_path / "run" / "rounds" / "round-000000.safetensors").unlink()
    assert run("run", *words) == 2
    assert "round-000000.safetensors is missing, and the run stopped in the middle of that round" in capsys.readouterr().err


class Package:
    """What the package brisque gives, for pictures that are the better the darker they are."""

    def __init__(self, url: bool):
        self.scale_features = lambda features: features

    def score(self, pixels: np.ndarray) -> float:
        return 100 * pixels.mean() / 255


def test_a_run_of_rounds_has_a_board(run, tmp_path, monkeypatch):
    """Pictures at the start are at no distance from themselves; what the run's page shows of hacking is made of its own rows, with the
    rewards that nothing is trained on: the parts that the world knows, and those that were asked for."""
    monkeypatch.setitem(sys.modules, "brisque", SimpleNamespace(BRISQUE=Package))
    assert run("run", "algo=online_diffusion_dpo", "optim.lr=1e-2", *ROUNDS, "train.steps=4", "evaluation.prompts=4",
               "evaluation.rewards=[brisque]") == 0
    first, last = (r for r in rows(tmp_path / "run", "eval") if "start_distance" in r)
    assert first["start_distance"] == 0 < last["start_distance"]
    train_rows = rows(tmp_path / "run")
    assert [r["samples"] for r in train_rows] == [8] * 4 and all(math.isfinite(r["rollout/reward"]) for r in train_rows)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Hacking board" in page and "Distance from the start" in page
    for step, row in ((0, first), (4, last)):
        images = [Image.open(p).convert("RGB") for p in sorted((tmp_path / "run" / "samples" / f"step-{step:06d}").iterdir())]
        captions = [s["prompt"] for s in read_jsonl(tmp_path / "run" / "samples.jsonl") if s["step"] == step]
        looks = [tiny_pictures.measures(*pair)["aesthetic"] for pair in zip(captions, images, strict=True)]
        darkness = [-100 * np.asarray(image).mean() / 255 for image in images]
        for name, values in (("look", looks), ("brisque", darkness)):
            assert row[f"held_out/{name}"] == pytest.approx(np.mean(values))
            assert row[f"held_out/{name}_low"] < row[f"held_out/{name}"] < row[f"held_out/{name}_high"]
    board = page[page.index("Hacking board") : page.index("Look, against the start")]
    assert all(f"step 4: {name} " in board for name in ("true reward", "prompt match", "brisque", "look"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["rewards"] == {"true_reward": "known of the world", "held_out/brisque": "PyPI package brisque"}
