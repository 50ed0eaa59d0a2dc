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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_log_probs_on_the_gpu(dtype, monkeypatch):
    """Against log-softmax in float64 of the same rounded inputs: the weight's gradient is summed in fp32."""
    from prefopt.policies import logprob
    from prefopt.policies.logprob import Head, token_logprobs

    monkeypatch.setitem(logprob.CHUNK, "cuda", 1 << 20)
    torch.manual_seed(0)
    hidden = (torch.randn(1500, 64, device="cuda") / 4).to(dtype).requires_grad_()
    weight = torch.randn(5000, 64, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(5000, (1500,), device="cuda")
    made = token_logprobs(hidden, Head(weight), targets)
    made.mean().backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = (exact[0] @ exact[1].t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    want.mean().backward()
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), want, rtol=tolerance, atol=tolerance)
    for got, expected in zip((hidden, weight), exact, strict=True):
        error = (got.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < tolerance


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3"])
def test_shared_prompts_on_the_gpu_equal_the_plain_path(family, tmp_path):
    from tests.toy import policy, save_model
    from tests.unit.test_families import ATTENTION
    from tests.unit.test_trees import batch, rows

    p = policy(save_model(tmp_path, family), attention=ATTENTION.get(family, "sdpa")).to("cuda").eval()
    micro = batch(p, rows(0, [2, 1, 5, 3])).to("cuda")
    with torch.no_grad():
        fast = p(micro)
        p.share = p.fuse = False
        torch.testing.assert_close(fast, p(micro), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("algo", ["grpo", "online_dpo", "reward_bt"])
def test_online_runs_and_reward_models_on_a_gpu(algo, tmp_path, tiny_lm):
    online = [] if algo == "reward_bt" else ["source.prompts=4", "source.samples=4", "source.epochs=2"]
    assert train(tmp_path / "run", f"algo={algo}", "hardware=1xgpu", "hardware.threads=1", *online) == 0


def test_qlora_on_a_gpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    from prefopt.config.schema import TrustConfig
    from prefopt.policies.causal_lm import CausalLM
    from tests.toy import data_config, model_config, save_model
    from tests.unit.test_trees import batch, rows

    cfg = model_config(save_model(tmp_path, "llama", hidden_size=64), {"enabled": True, "r": 4}, quantize="4bit")
    p = CausalLM(cfg, data_config(), TrustConfig(), torch.device("cuda"), "bf16", 0)
    micro = batch(p, rows(0, [2, 2])).to(p.device)
    p(micro).mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in p.trainable().values())
