"""What only a GPU can show. Skipped without CUDA."""

from __future__ import annotations

import json

import pytest
import torch

from tests.toy_runs import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny-lm", "tiny-lm-lora"])
def test_a_run_on_a_gpu(precision, model, tmp_path, tiny_lm):
    overrides = ["hardware=1xgpu", "hardware.threads=1", f"hardware.precision={precision}", f"model={model}"]
    assert train(tmp_path / "run", *overrides) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["device"].startswith("cuda") and manifest["precision"] == precision


def test_log_probs_on_the_gpu_equal_those_on_the_cpu(tiny_lm):
    from prefopt.config.schema import DataConfig, ModelConfig, TrustConfig
    from prefopt.data.batch import build
    from prefopt.data.dataset import make_dataset
    from prefopt.data.sources import load_data
    from prefopt.policies.causal_lm import CausalLM

    data = DataConfig(name="tiny-feedback", source="tiny_feedback", limit=16, eval_limit=1)
    split, _ = load_data(data)
    scores = []
    for device in ("cpu", "cuda"):
        policy = CausalLM(ModelConfig(name="tiny-lm"), data, TrustConfig(), torch.device(device), "fp32", 0)
        rows = make_dataset(split, data, policy.tokenise, "pairs", (), False, 0).rows
        with torch.no_grad():
            scores.append(policy(build(rows, list(range(16)), "pairs", policy.pad).to(device)).cpu())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
