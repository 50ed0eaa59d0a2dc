"""Methods that learn from a diffusion model's own pictures end on two processes where they end on one: weights, rounds, and what is logged.
Where deepspeed is installed some of them are under ZeRO."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from prefopt.launch import app
from prefopt.rewards import step_aware
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from tests.distributed.launching import torchrun
from tests.distributed.picture_round_runs import SCORER_STEPS
from tests.distributed.test_zero_runs import ADAM
from tests.tiny_pipelines import save
from tests.toy_runs import train

# Three rows a step and three chunks a round leave the processes unequal shares.
COMMON = ["model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=6", "data.eval_limit=3", "train.batch_size=3",
          "train.steps=3", "train.eval_every=3", "source.prompts=3", "sampler.steps=2", "evaluation.kl=false", "evaluation.prompts=0"]
FLOW, UNET = ["model=tiny-flow", "model.max_sequence_length=16", "model.guidance=1.5"], ["model=tiny-diffusion"]
BRANCHES = ["trajectory.steps=4", "trajectory.window=[1,3]", "sampler.batch_size=1", "trajectory.threshold=0"]
GRPO = ["algo=flow_grpo", *FLOW, "trajectory.steps=4", "trajectory.window_size=2", "sampler.batch_size=4", "source.samples=4"]
CASES = {  # ZeRO stage and words
    "flow_grpo, two steps a round": (0, [*GRPO, "source.epochs=2", "evaluation.prompts=3"]),
    "ddpo, advantages from a prompt's past": (0, ["algo=ddpo", *UNET, "trajectory.steps=4", "sampler.batch_size=4", "source.samples=3",
                                                  "data.limit=3", "trajectory.min_count=4"]),
    "spo_diffusion, a scorer of its own": (3, ["algo=spo_diffusion", *UNET, *BRANCHES]),
    "gradspo, an average draws": (0, ["algo=gradspo", *UNET, *BRANCHES]),
    "online_diffusion_dpo": (2, ["algo=online_diffusion_dpo", *UNET, "sampler.batch_size=2", "evaluation.prompts=3"]),
    "seppo, one process draws nothing": (0, ["algo=seppo", *UNET, "reference.every=1", "sampler.batch_size=8"]),
    "d3po": (2, ["algo=d3po", *UNET, "trajectory.steps=4", "sampler.batch_size=4", "source.samples=2"]),
    "dpok, a learned baseline": (0, ["algo=dpok", *UNET, "trajectory.steps=4", "sampler.batch_size=4", "source.samples=2"]),
    "spro_selfplay": (0, ["algo=spro_selfplay", *FLOW, "sampler.batch_size=4", "source.samples=4"]),
    "rpo_subject": (0, ["algo=rpo_subject", *FLOW, "sampler.batch_size=4"]),
}
WEIGHTS = 1e-5  # which have moved by up to 1e-3; the largest difference seen was 8e-7
ZERO = find_spec("deepspeed") is not None
OF_SPEED = ("time", "seconds", "second", "mfu", "memory")  # what a step's row says beside what was computed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs: those of one process, and those of two, which make them in one go."""
    root, patch = tmp_path_factory.mktemp("rounds"), pytest.MonkeyPatch()
    paths = {"model=tiny-flow": save("sd3", root / "sd3"), "model=tiny-diffusion": save("sd15", root / "sd15")}
    patch.setattr(step_aware, "STEPS", SCORER_STEPS)
    composed, real = [], app.run_here
    patch.setattr(app, "run_here", lambda cfg: composed.append(asdict(cfg)) or real(cfg))
    for number, (_, words) in enumerate(CASES.values()):
        words = [*COMMON, *words, *ADAM, *[f"model.path={path}" for model, path in paths.items() if model in words]]
        assert train(root / f"one-{number}", *words) == 0
    patch.undo()
    stages = {f"two-{number}": stage * ZERO for number, (stage, _) in enumerate(CASES.values())}
    jobs = []
    for (name, stage), config in zip([*stages.items(), ("rounded", 0)], [*composed, composed[0]], strict=True):
        hardware = config["hardware"] | {"processes": 2, "zero": stage}  # to compose them again would take as long as the runs
        jobs.append({"config": config | {"run_dir": str(root / name), "hardware": hardware}, "algo": config["algo"]["name"], "kill": None})
    (root / "jobs.json").write_text(json.dumps(jobs))
    torchrun("-m", "tests.distributed.picture_round_runs", str(root / "jobs.json"))
    return root


def close(a: dict, b: dict, rel: float = 2e-3) -> None:
    """Numbers but for the rounding of sums that nearly cancel; all else alike."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == (pytest.approx(value, rel=rel, abs=1e-3) if isinstance(value, float) else value), name


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_two_processes_end_where_one_process_ends(number, runs):
    one, two = runs / f"one-{number}", runs / f"two-{number}"
    ours, theirs = (checkpoint.steps(folder / "checkpoints")[-1] for folder in (one, two))
    files = sorted(file.name for file in ours.glob("*.safetensors"))
    assert files == sorted(file.name for file in theirs.glob("*.safetensors")) and "weights.safetensors" in files
    for file in files:  # weights, moments, and what moves along with the weights
        a, b = load_file(ours / file), load_file(theirs / file)
        assert a.keys() == b.keys()
        names = a.keys() - {"rng"}
        apart, largest = max(float((a[n] - b[n]).abs().max()) for n in names), max(float(a[n].abs().max()) for n in names)
        assert apart <= (1e-3 * largest if file == "optimizer.safetensors" else WEIGHTS) and largest > 0, file
    assert sorted(f.name for f in (one / "rounds").iterdir()) == sorted(f.name for f in (two / "rounds").iterdir())
    rounds = sorted((one / "rounds").glob("*.jsonl"))
    assert len(rounds) >= 2
    for file in rounds:
        for a, b in zip(read_jsonl(file), read_jsonl(two / "rounds" / file.name), strict=True):
            close(a, b)
    for a, b in zip(read_jsonl(one / "metrics.jsonl"), read_jsonl(two / "metrics.jsonl"), strict=True):
        if a["split"] != "check":  # whose loss is that of the main process's rows
            close(*({k: v for k, v in row.items() if not any(word in k for word in OF_SPEED)} for row in (a, b)))


def test_walks_that_one_process_has_wrong_stop_both(runs):
    """The main process, whose own are right, says why."""
    status = json.loads((runs / "rounded" / "status.json").read_text())
    assert status["state"] == "failed" and "replay check: a stored transition has a probability ratio of 1" in status["message"]
