"""Runs that need another run first, in the bandit world: what is run, in which folder, refused, stopped and gone on with."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.data import bandit
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.engine import Engine
from tests.toy import save_model
from tests.toy_runs import FAST, train

BANDIT = ["model=bandit", "data=bandit"]
JUDGED = ["train.eval_every=4", "train.save_every=1"]  # at the start and at the end; a checkpoint at each step
BRIDGE = [*BANDIT, *JUDGED, "algo=sft_dpo_bridge", "algo.beta=0.3"]


def table(folder: Path) -> torch.Tensor:
    return load_file(folder / "model" / "model.safetensors")["logits"]


def config(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stages") / "whole"
    assert train(run, *BRIDGE) == 0
    return run


def test_a_stage_is_the_run_that_one_would_make_by_hand(whole, tmp_path):
    first, second = tmp_path / "sft", tmp_path / "dpo"
    assert train(first, *BANDIT, *JUDGED, "algo=sft") == 0
    assert train(second, *BRIDGE, "stages=none", f"model.start={first}") == 0
    assert torch.equal(table(whole / "stages" / "sft"), table(first)) and torch.equal(table(whole), table(second))
    start = [row for row in read_jsonl(whole / "metrics.jsonl") if row["split"] == "eval"][0]
    assert start["kl"] == pytest.approx(0, abs=1e-6), "the run starts from the stage's policy, and that is its reference"


def test_what_a_run_says_of_its_stages(whole):
    assert config(whole)["model"]["start"] == "${stage:sft}", "so the folder can be moved, and seeds of one method can be compared"
    assert config(whole)["stages"] == {"sft": {"algo": "sft", "source": "offline", "reference": "default", "optim": {"lr": 0.05}}}
    stage = config(whole / "stages" / "sft")
    assert stage["algo"]["name"] == "sft" and stage["stages"] == {} and stage["model"]["start"] is None
    about = json.loads((whole / "manifest.json").read_text())
    assert about["stages"]["sft"]["run"] == "stages/sft" and about["stages"]["sft"]["settings"]["algo"] == "sft"
    assert about["model"]["path"] == str(whole / "stages" / "sft" / "model") and len(about["model"]["fingerprint"]) == 64
    command = json.loads((whole / "stages" / "sft" / "manifest.json").read_text())["command"]
    assert "algo=sft" in command and "sft_dpo_bridge" not in command and "algo.beta" not in command


def test_a_run_with_stages_can_be_moved(whole, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    assert main(["eval", f"run={moved}", "prompts=2"]) == 0
    assert json.loads((moved / "manifest.json").read_text())["stages"]
    assert main(["sample", f"run={moved / 'stages' / 'sft'}", "count=1"]) == 0


def test_a_finished_run_and_a_finished_stage_are_left_alone(whole, tmp_path, capsys, monkeypatch):
    before = (whole / "stages" / "sft" / "metrics.jsonl").read_bytes()
    assert train(whole, *BRIDGE) == 0 and "is finished" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(whole / "stages", run / "stages")
    monkeypatch.chdir(tmp_path)
    assert train(run, *BRIDGE) == 0
    assert "stage sft: had finished before" in capsys.readouterr().err and torch.equal(table(run), table(whole))
    assert (run / "stages" / "sft" / "metrics.jsonl").read_bytes() == before


def stopping(monkeypatch, at: int, how) -> None:
    real, calls = Engine.step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == at:
            how()
        return real(self, *args)

    monkeypatch.setattr(Engine, "step", step)


def killed():
    raise SystemError("killed")


@pytest.mark.parametrize("at", [3, 6], ids=["in the stage", "after the stage"])
def test_a_killed_run_goes_on_to_the_same_bits(at, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, at, killed)
        with pytest.raises(SystemError):
            train(tmp_path / "run", *BRIDGE)
    assert train(tmp_path / "run", *BRIDGE) == 0
    assert torch.equal(table(tmp_path / "run"), table(whole))
    steps = [r["step"] for r in read_jsonl(tmp_path / "run" / "stages" / "sft" / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_a_signal_in_a_stage_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(run, *BRIDGE) == 143
    assert f"stage sft was stopped; the command of the main run, with hydra.run.dir={run}, goes on with it" in capsys.readouterr().err
    assert json.loads((run / "stages" / "sft" / "status.json").read_text())["state"] == "stopped" and not (run / "model").exists()
    assert train(run, *BRIDGE, "seed=1") == 2
    assert "stages/sft belongs to a run with another config (seed: 0 -> 1)" in capsys.readouterr().err
    assert train(run, *BRIDGE) == 0 and torch.equal(table(run), table(whole))


def test_a_stage_that_fails_says_which(tmp_path, capsys, monkeypatch):
    def poisoned(self, *args, real=Engine.step):
        next(iter(self.policy.parameters())).data.fill_(float("nan"))
        return real(self, *args)

    monkeypatch.setattr(Engine, "step", poisoned)
    assert train(tmp_path / "run", *BRIDGE, "train.max_skipped_steps=1") == 1
    assert "stage sft: loss or gradient was not finite" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("words, said", [
    (["stages.sft.algo=sftt"], "stages.sft: there is no algo=sftt; did you mean 'algo=sft'?"),
    (["stages.sft.optim.lr=-1"], "stages.sft: optim.lr=-1.0: it must be above 0"),
    (["+stages.sft.optim.lrr=1"], "stages.sft: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    (["+stages.sft.train.batch_size=many"], "stages.sft: train.batch_size=many: it must be a whole number"),
    (["stages.sft.lr=1"], "stages.sft.lr is not among the settings of the chosen stages"),
    (["stages.sft.algo=kto", "+stages.sft.train.batch_size=1"], "stages.sft: train.batch_size=1: KTO needs at least 2 rows per step"),
    (["model.start=x"], "stages.sft would be trained for nothing: no key holds ${stage:sft}, its run; add stages=none"),
    (["+stages.late.algo=dpo"], "stages.late would be trained for nothing"),
    (["stages=none", "model.start=${stage:sft}"], "model.start=${stage:sft}: there is no such stage among the stages; there are none"),
    (["+stages.late.model.start=${stage:late}"], "model.start=${stage:late}: there is no such stage among the stages before it"),
    (["stages.sft.algo=tgdpo"], "stages.sft: algo=tgdpo has stages of its own (dpo), and a stage can have none"),
    (["+stages.sft.stages=dpo"], "stages.sft.stages=dpo: a stage has none of its own"),
    (["stages.sft=3"], "stages.sft=3: a stage has settings of its own, such as stages.sft.algo=sft"),
    (["stages=none", "model.start=nowhere"], "model.start=nowhere: there is no such folder"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(words, said, tmp_path, capsys):
    assert main(["train", "hydra.run.dir=run", *FAST, *BRIDGE, *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_ways_of_looking_train_nothing(tmp_path, capsys, monkeypatch):
    assert main(["train", "--cfg", "job", *BRIDGE]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["start"] == "${stage:sft}" and shown["stages"]["sft"]["optim"]["lr"] == "${optim.lr}"
    assert main(["train", "--cfg", "job", "--resolve", *BRIDGE, "hydra.run.dir=there"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["start"] == "there/stages/sft"
    assert main(["data", "check", *BANDIT, "algo=sft_dpo_bridge"]) == 0 and "view: pairs" in capsys.readouterr().out
    planned = []
    monkeypatch.setattr("prefopt.training.plan_text.plan_text", lambda cfg: planned.append(cfg) or f"a plan of {cfg.algo['name']}")
    assert main(["plan", *BRIDGE]) == 0
    out = capsys.readouterr().out
    assert [cfg.algo["name"] for cfg in planned] == ["sft", "sft_dpo_bridge"] and out.count("a plan of") == 2
    assert "stage sft, which comes first: prefopt plan model=bandit" in out and not list(tmp_path.iterdir())


def test_stages_of_a_sweep(tmp_path, monkeypatch, capsys):
    """The jobs themselves are replaced: what is tested is which ones there are, and what becomes of one whose stage fails."""
    ran = []

    def job(of, cfg, words):
        ran.append((cfg.algo["name"], cfg.optim.lr, Path(cfg.run_dir)))
        assert (Path(cfg.run_dir) / "config.yaml").exists()
        assert cfg.algo["name"] != "sft" or (Path(cfg.run_dir).parents[1] / "config.yaml").exists(), "the job's folder is claimed first"
        return ("failed", "no luck") if cfg.optim.lr == 0.2 and cfg.algo["name"] == "sft" else ("finished", "")

    monkeypatch.setattr("prefopt.launch.jobs.run_apart", job)
    assert main(["train", "-m", *FAST, *BRIDGE, "stages.sft.optim.lr=0.1,0.2", "hydra.sweep.dir=sweep",
                 "hydra.launcher.jobs=1"]) == 1
    assert [(name, lr) for name, lr, _ in ran] == [("sft", 0.1), ("sft_dpo_bridge", 0.05), ("sft", 0.2)]
    assert ran[0][2] == ran[1][2] / "stages" / "sft" and ran[1][2].parent.name == "sweep"
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [j["state"] for j in jobs] == ["finished", "failed"] and jobs[1]["message"] == "stage sft: no luck"
    assert not list((tmp_path / "sweep").glob("*/config.yaml")), "a job that never began lets go of its folder"


def test_a_job_of_a_sweep_whose_folder_is_taken_trains_no_stage(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("prefopt.launch.jobs.run_apart", lambda of, cfg, words: ran.append(cfg) or ("finished", ""))
    words = ["-m", *FAST, *BRIDGE, "seed=0", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=job"]
    (tmp_path / "sweep" / "job").mkdir(parents=True)
    (tmp_path / "sweep" / "job" / "mine.txt").touch()
    assert main(["train", *words]) == 1 and not ran
    assert "is not empty and holds no run of prefopt" in json.loads((tmp_path / "sweep" / "sweep.json").read_text())[0]["message"]


def test_two_stages_of_which_one_needs_the_other(tmp_path):
    """SFT, DPO from there, and a run from that: three runs, each starting where the one before has ended."""
    words = ["algo=ipo", "stages=sft", "+stages.dpo.algo=dpo", "+stages.dpo.model.start='${stage:sft}'", "model.start='${stage:dpo}'"]
    assert train(tmp_path / "run", *BANDIT, *words) == 0
    run, stages = tmp_path / "run", tmp_path / "run" / "stages"
    starts = [json.loads((folder / "manifest.json").read_text())["model"]["path"] for folder in (stages / "sft", stages / "dpo", run)]
    assert starts == [None, str(stages / "sft" / "model"), str(stages / "dpo" / "model")]
    assert not torch.equal(table(run), table(stages / "dpo"))


@pytest.mark.parametrize("adapter", [[], ["adapter=lora"], ["adapter=lora", "stages.sft.algo=dpo"]], ids=["full", "lora", "lora twice"])
def test_language_models_start_from_their_stage(adapter, tmp_path):
    """The self-check holds policy and reference to each other before the first step."""
    pairs = tmp_path / "pairs.jsonl"
    said = ("I am well.", "Two and two make four.", "Paris", "a fox", "Lima", "six")
    pairs.write_text("".join(json.dumps({"prompt": f"How are you, {a}?", "chosen": said[i % 6], "rejected": said[(i + 1) % 6]}) + "\n"
                             for i, a in enumerate("abcdefghijkl")))
    words = [f"model.path={save_model(tmp_path / 'model')}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.25", *adapter,
             "sampler.max_new_tokens=8", "train.eval_every=4", "optim.lr=0.01"]
    assert train(tmp_path / "run", "algo=sft_dpo_bridge", *words) == 0
    stage, run = ([r for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == "eval"]
                  for folder in (tmp_path / "run" / "stages" / "sft", tmp_path / "run"))
    assert run[0]["logp/chosen"] == pytest.approx(stage[-1]["logp/chosen"], abs=1e-4), "it starts where the stage has ended"
    assert run[0]["log_ratio/chosen"] == pytest.approx(0, abs=1e-4) and run[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(stage[-1]["log_ratio/chosen"]) > 0.01 and main(["eval", f"run={tmp_path / 'run'}", "prompts=2"]) == 0


def test_a_reward_model_is_trained_for_a_run_that_starts_from_an_adapter(tmp_path, tiny_lm, capsys):
    common = ["model=tiny-lm-lora", "evaluation.prompts=0", "train.steps=1", "data.limit=8", "data.eval_limit=4"]
    first, run = tmp_path / "first", tmp_path / "run"
    assert train(first, "algo=dpo", *common) == 0
    judged = ["reward=model", "stages=reward", "reward.path=${stage:reward}"]
    assert train(run, "algo=dpo", *judged, f"model.start={first}", *common) == 0
    assert config(run)["model"]["start"] == str(first) and config(run / "stages" / "reward")["model"]["start"] is None
    assert train(tmp_path / "alone", "algo=reward_bt", f"model.start={first}", *common) == 2
    assert "holds a policy's LoRA adapter, and a reward model can start from whole weights only" in capsys.readouterr().err


# ---- what the two systems made of stages promise -------------------------------------------------


def expected(logits: torch.Tensor, values: torch.Tensor, prompts: list[int]) -> float:
    return float((logits.double().softmax(-1) * values)[prompts].sum(-1).mean())


def test_sft_moves_further_from_its_start_the_higher_its_rate(tmp_path):
    """What the bridge is about (arXiv 2507.00018): SFT's loss hardly differs, the distance to the start does."""
    start, kls, losses = torch.tensor(bandit.reference_table()).double(), [], []
    for rate in (0.01, 0.03, 0.1):
        run = tmp_path / f"{rate}"
        assert train(run, *BANDIT, "algo=sft", "data.limit=null", "data.eval_limit=60", "train.batch_size=60", "train.steps=20",
                     f"optim.lr={rate}", "train.eval_every=20") == 0
        rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "eval"]
        assert rows[0]["log_ratio/chosen"] == pytest.approx(0, abs=1e-6) == rows[0]["log_ratio/rejected"]
        assert rows[-1]["log_ratio/chosen"] > 0, "SFT learns an implicit reward too"
        moved = table(run).double().log_softmax(-1)
        kls.append(float((moved.exp() * (moved - start)).sum(-1).mean()))
        losses.append(rows[-1]["loss"])
        assert losses[-1] < rows[0]["loss"]
    assert kls[0] < kls[1] < kls[2] and kls[2] > 10 * kls[0]
    assert max(losses) - min(losses) < 0.6


def test_mpo_goes_on_from_the_easy_pairs_to_the_hard_ones(tmp_path):
    run, second = tmp_path / "first", tmp_path / "second"
    whole = ["data.limit=null", "data.eval_limit=60", "train.batch_size=30", "train.eval_every=40", "train.steps=40"]
    assert train(run, *BANDIT, *whole, "algo=mpo_mixed", "optim.lr=0.1") == 0
    stage = config(run / "stages" / "reward")
    assert stage["algo"]["name"] == "reward_bt" and stage["data"]["transforms"] == {}
    assert config(run)["data"]["transforms"]["score"]["path"] == "${stage:reward}"
    judge = f"{run}/stages/reward"
    hard = ["transforms=gap_split", "data.transforms.gap_split.part=hard", f"data.transforms.score.path={judge}"]
    assert train(second, *BANDIT, *whole, "algo=grpo", f"model.start={run}", *hard, "reward=model", f"reward.path={judge}", "optim.lr=0.1",
                 "source.prompts=4", "sampler.batch_size=64") == 0
    rows = read_jsonl(second / "metrics.jsonl")
    assert next(r for r in rows if r["split"] == "train")["kl_to_reference"] == pytest.approx(0, abs=1e-6), "it starts from its reference"
    easy, other = (json.loads((folder / "manifest.json").read_text())["data"]["train"]["rows"] for folder in (run, second))
    assert easy + other == 60 and easy == 30
    # Judged where it was to help: on the prompts of the pairs that the reward model finds difficult.
    found, pairs = table(run / "stages" / "reward"), list(itertools.combinations(range(bandit.REPLIES), 2))
    gaps = {(x, a, b): abs(float(found[x, a] - found[x, b])) for x in range(bandit.PROMPTS) for a, b in pairs}
    difficult = [x for (x, _, _), gap in gaps.items() if gap < sorted(gaps.values())[-easy]]
    assert len(difficult) == other and len(set(difficult)) > 1
    true = torch.tensor(bandit.reward_table()).double()
    assert expected(table(run), true, difficult) < expected(table(second), true, difficult)
