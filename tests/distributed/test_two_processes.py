"""Two processes over gloo compute what one does. Subprocesses, because that is the thing under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from prefopt.config.catalogue import algo_info, groups
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.auto_beta import find_beta
from tests.distributed.launching import torchrun
from tests.toy_runs import fresh_accelerator, gradients
from tests.unit.test_engine import engine_of, objective_named, rows_for, source_of


def test_gradients_and_metrics_of_2x4_equal_1x8_for_every_algorithm(tmp_path):
    slugs = [slug for slug in groups()["algo"] if not algo_info(slug).stepwise]
    torchrun("-m", "tests.distributed.ranks", str(tmp_path / "out.pt"), *slugs)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    for slug in slugs:
        objective = objective_named(slug)
        with fresh_accelerator() as accelerator:
            engine = engine_of(objective, accelerator)
            micros = source_of(objective, rows_for(objective, 8), 10**6).step(0)
            grads, loss = gradients(engine, micros)
            result = engine.step(micros, 0.0)
        assert float(two[slug]["loss"]) == pytest.approx(loss, rel=1e-9), slug
        assert two[slug]["metrics"] == pytest.approx(result.metrics, rel=1e-9), slug
        assert two[slug]["norm"] == pytest.approx(result.grad_norm, rel=1e-9), slug  # what is clipped by: of the whole gradient (trap 33)
        for name in grads:
            torch.testing.assert_close(two[slug]["grads"][name], grads[name], rtol=1e-8, atol=1e-12)
    objective = objective_named("dpo")
    with fresh_accelerator() as accelerator:
        source = source_of(objective, rows_for(objective, 16), 10**6)
        beta, _ = find_beta(engine_of(objective, accelerator), source.step(0), source.step(1), 0.45)
    first, second = two["betas"].tolist()  # a beta for each rank would be trap 4.26
    assert first == second == pytest.approx(beta, rel=1e-8)


@pytest.mark.parametrize("algo", ["dpo", "kto", "grpo"])
def test_a_run_on_two_processes_ends_where_one_process_ends(algo, tmp_path, tiny_lm):
    # Adam divides by the root of what may be a very small number, which would magnify the rounding of a gradient that is nearly 0.
    common = ["-m", "prefopt.cli", "train", f"algo={algo}", "debug=fast", "evaluation.prompts=8", "optim.eps=1e-6"]
    if algo == "grpo":  # two rounds of two steps, sampled in chunks that the processes share
        common += ["source.prompts=4", "source.samples=4", "source.epochs=2", "sampler.batch_size=8", "sampler.max_new_tokens=24"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, *common, f"hardware={hardware}", f"hydra.run.dir={tmp_path / folder}"], env=env,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for hardware, folder in (("cpu", "one"), ("2xcpu", "two"))]  # beside each other: most of the time they start
    for run in runs:
        said = run.communicate(timeout=240)[1]
        assert run.returncode == 0, said[-2000:]
    one, two = (load_file(checkpoint.steps(tmp_path / f / "checkpoints")[-1] / "weights.safetensors") for f in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-5)
    if algo == "grpo":
        written = [[read_jsonl(p) for p in sorted((tmp_path / f / "rounds").iterdir())] for f in ("one", "two")]
        assert [[s["ids"] for s in r] for r in written[0]] == [[s["ids"] for s in r] for r in written[1]]
        return  # it has no loss on given rows
    losses = [[r["loss"] for r in read_jsonl(tmp_path / f / "metrics.jsonl") if r["split"] == "eval"] for f in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    samples = [[(s["step"], s["id"], s["completion"]) for s in read_jsonl(tmp_path / f / "samples.jsonl")] for f in ("one", "two")]
    assert samples[0] == samples[1] and len(samples[0]) >= 16


def test_the_first_error_of_a_worker_is_one_sentence(tmp_path, tiny_lm):
    broken = tmp_path / "pairs.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    done = subprocess.run([sys.executable, "-m", "prefopt.cli", "train", "hardware=2xcpu", "data=jsonl", f"data.path={broken}",
                           f"hydra.run.dir={tmp_path / 'run'}"], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert "pairs.jsonl row 1: chosen and rejected are the same text" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_to_the_parent_leaves_two_processes_resumable(tmp_path, tiny_lm):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prefopt.cli", "train", "hardware=2xcpu", "debug=fast", "train.steps=400", "train.eval_every=400",
               f"hydra.run.dir={run}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_jsonl(run / "metrics.jsonl")) < 3:
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said[-2000:]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and status["step"] > 0
    assert checkpoint.steps(run / "checkpoints")[-1].name == f"step-{status['step']:06d}"
