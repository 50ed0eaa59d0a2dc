"""A run on pictures from the first step to the comparison: training, resuming, eval, sample, compare, with a pipeline of random weights."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.data.tiny_pictures import true_reward
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from tests.e2e.test_trackers import teardown
from tests.e2e.test_train import interrupt_at
from tests.tiny_pipelines import save
from tests.toy_runs import train
from tests.unit.test_report import Tags
from tests.wandb_reader import artifact_files, history

STEPS = "sampler.steps=2"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    pipeline = save("sd15", tmp_path_factory.mktemp("pipeline"))
    return ["model=tiny-diffusion", f"model.path={pipeline}", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures",
            "data.limit=16", "algo=diffusion_dpo", "optim.lr=1e-3", "optim.warmup=0", "train.eval_every=2", STEPS]


@pytest.fixture(scope="module")
def runs(words, tmp_path_factory):
    """Two methods, one of them killed after its third step and continued, the other one told to W&B."""
    root, home = tmp_path_factory.mktemp("runs"), str(tmp_path_factory.mktemp("home"))
    (root / "here").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "here")
        for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, home)
        assert train(root / "one", *words) == 0
        with patch.context() as killing:
            interrupt_at(killing, 4, error=SystemError("killed"))
            with pytest.raises(SystemError):
                train(root / "killed", *words)
        assert checkpoint.steps(root / "killed" / "checkpoints")[-1].name == "step-000002"
        assert train(root / "killed", *words) == 0
        teardown()
        assert train(root / "two", *words, "algo.beta=0.5", "tracker=wandb-offline") == 0
        teardown()
    return root


def test_trap_4_28_nothing_is_written_beside_the_runs(runs):
    """They train, judge, sample and are killed; their words name no other folder."""
    assert sorted(place.name for place in runs.iterdir()) == ["here", "killed", "one", "two"]
    assert not list((runs / "here").iterdir()) and list((runs / "one" / "samples").rglob("*.png"))


def test_trap_4_27_a_sample_is_judged_under_its_own_caption(runs):
    rows = read_jsonl(runs / "one" / "samples.jsonl")
    images = [Image.open(runs / "one" / row["image"]) for row in rows]
    own, others = ([true_reward(row["prompt"], image) for row, image in zip(order, images, strict=True)] for order in (rows, rows[::-1]))
    assert [row["reward"] for row in rows] == pytest.approx(own) and own != others


def test_a_killed_run_continues_to_the_same_bits(runs):
    one, two = (load_file(checkpoint.steps(runs / name / "checkpoints")[-1] / "weights.safetensors") for name in ("one", "killed"))
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    first, last = ([{k: v for k, v in row.items() if k in ("step", "split", "loss", "accuracy", "accuracy_at/25", "variety")}
                    for row in read_jsonl(runs / name / "metrics.jsonl")] for name in ("one", "killed"))  # fmt: skip
    assert first == last


def test_wandb_has_the_pictures_of_each_evaluation(runs):
    """Under their captions, byte by byte; and in the last table, beside those from before."""
    samples = read_jsonl(runs / "two" / "samples.jsonl")
    (file,) = (runs / "two" / "wandb").glob("*/*.wandb")
    shown = [row for row in history(file) if "images.filenames" in row]
    assert [row["step"] for row in shown] == [0, 2, 4]
    for row in shown:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        assert row["images.captions"] == [sample["prompt"] for sample in own] and len(own) == 4
        assert [(file.parent / "files" / name).read_bytes() for name in row["images.filenames"]] == [
            (runs / "two" / sample["image"]).read_bytes() for sample in own]
    table = artifact_files(file)
    before, after = (table[cell["path"]] for cell in json.loads(table["samples.table.json"])["data"][0][2:4])
    assert [before, after] == [(runs / "two" / sample["image"]).read_bytes() for sample in (samples[0], samples[-4])]


def test_what_evaluations_of_a_run_measure(runs):
    evals = [row for row in read_jsonl(runs / "one" / "metrics.jsonl") if row["split"] == "eval"]
    assert [row["step"] for row in evals] == [0, 2, 4]
    quarters = [f"accuracy_at/{low}" for low in (0, 25, 50, 75)]
    assert all(evals[0][key] == 0.5 for key in quarters), "policy and reference agree"
    assert any(evals[-1][key] != 0.5 for key in quarters)
    for row in evals:
        assert 0 <= row["prompt_match"] <= 1 and row["prompt_match_low"] <= row["prompt_match"] <= row["prompt_match_high"]
        assert {"saturation", "high_frequency", "variety", "all_parts", "match/colour", "true_reward", "win_rate", "kl"} <= row.keys()
        assert not {"length", "finished", "distinct_2", "lc_win_rate", "ranking_accuracy_per_token"} & row.keys()
    samples = read_jsonl(runs / "one" / "samples.jsonl")
    assert len(samples) == 3 * 4 and not any({"tokens", "completion", "finished"} & row.keys() for row in samples)
    page = Tags((runs / "one" / "report.html").read_text(encoding="utf-8")).text
    for said in ("Accuracy by noise", "Prompt match", "Variety", "Pictures trained on", "Implicit reward of the chosen picture"):
        assert said in page, said
    assert "token" not in page.partition("Reproduce")[0] and "Tokens" not in page.partition("Definitions")[2]


def test_eval_says_what_pictures_have_and_nothing_of_texts(runs, capsys):
    assert main(["eval", f"run={runs / 'one'}", f"against={runs / 'two'}", STEPS]) == 0
    said, found = capsys.readouterr().out, json.loads((runs / "one" / "eval.json").read_text())
    assert found["not_measured"] == {} and "per token" not in said and "length" not in said and "distinct" not in said
    for line in ("on draws 25 to 50 % into noise", "prompt match, %", "variety between prompts", "saturation, %", "Fréchet distance"):
        assert line in said, line
    assert 0 <= found["frechet"]["low"] <= found["frechet"]["value"] <= found["frechet"]["high"] and found["frechet"]["value"] > 0
    assert {"accuracy", "accuracy_at/50", "true_reward", "saturation"} <= found["against"]["difference"].keys()
    assert "lc_win_rate" not in found["against"] and 0 <= found["against"]["win_rate"] <= 1
    last = read_jsonl(runs / "one" / "metrics.jsonl")[-1]
    for name in ("accuracy", "accuracy_at/75", "logp/chosen"):
        assert found["after"][name] == pytest.approx(last[name], rel=1e-5), name
    assert main(["eval", f"run={runs / 'one'}", "tokens=true"]) == 2
    assert "makes pictures, which have no tokens" in capsys.readouterr().err


def test_sample_writes_pictures_before_and_after(runs, tmp_path, capsys):
    ask = ["sample", f"run={runs / 'one'}", "count=2", STEPS]
    assert main(ask) == 0
    said, folder = capsys.readouterr().out, runs / "one" / "asked"
    wanted = {"before-and-after.png", *(f"{number}-{when}.png" for number in ("000", "001") for when in ("before", "after"))}
    assert {path.name for path in folder.iterdir()} == wanted
    assert str(folder / "001-after.png") in said and str(folder / "before-and-after.png") in said and "diversity" not in said
    before, after = (Image.open(folder / f"000-{name}.png") for name in ("before", "after"))
    assert before.size == after.size == (16, 16) and before.tobytes() != after.tobytes()
    new = [*ask, 'prompt="a small fox, asleep"', f"output={tmp_path / 'out'}"]
    assert main(new) == 0
    said = capsys.readouterr().out
    assert said.count("> a small fox, asleep") == 2 and "diversity of the 2 pictures" in said
    first = (tmp_path / "out" / "000-after.png").read_bytes()
    assert first != (tmp_path / "out" / "001-after.png").read_bytes(), "one caption, two pictures"
    assert main([*new, "count=1"]) == 0 and (tmp_path / "out" / "000-after.png").read_bytes() == first, "the same seed, the same picture"
    capsys.readouterr()
    assert main([*ask, "revise=1"]) == 2 and "pictures are not revised" in capsys.readouterr().err


def test_methods_on_pictures_are_compared(runs, tmp_path, capsys):
    assert main(["compare", str(runs / "one"), str(runs / "two"), "--output", str(tmp_path / "page.html")]) == 0
    said, page = capsys.readouterr().out, Tags((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "pictures/s" in said and "true reward" in said and "A against B" in said
    for words in ("length", "token", "Reply"):
        assert words not in said and words not in page.partition("How this was computed")[0], words
