"""Packed rows on the GPU's own kernels: against padded rows of the same model, forwards and backwards. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch

from prefopt.config.schema import SamplerConfig, TrustConfig
from prefopt.data.batch import build
from prefopt.policies import packed
from prefopt.policies.causal_lm import CausalLM
from prefopt.policies.reward_model import RewardModel
from prefopt.policies.trees import plant
from tests.toy import FAMILIES, data_config, model_config, save_model
from tests.unit.test_trees import LORA, batch, gradients, plain, rows, stir

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CUDA = torch.device("cuda")
UNCAPPED = [family for family in FAMILIES if family != "gemma2"]
# Kernels want heads of at least 16 numbers; weights of common size keep bf16's rounding small.
SHAPE = {"hidden_size": 64, "head_dim": 32, "initializer_range": 0.05}


@pytest.fixture(params=["varlen", "flex"])
def kernel(request):
    if request.param == "varlen" and not packed.has_varlen(CUDA):
        pytest.skip("this torch or GPU has no varlen_attn with windows")
    return request.param


def model(folder, kind=CausalLM, precision="bf16", lora=None, **settings):
    return kind(model_config(folder, lora, **settings), data_config(), TrustConfig(), CUDA, precision, 0)


def close(made: dict, wanted: dict, tolerance: float) -> None:
    for name, gradient in wanted.items():
        assert (made[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["", "grouped"])
def test_varlen_is_what_the_cpu_computes(window, heads):
    """The causal mask is aligned to the last query and key, windows count as many keys, grouped heads are shared: all as one_by_one."""
    if not packed.has_varlen(CUDA):
        pytest.skip("this torch or GPU has no varlen_attn with windows")
    micro = build(rows(0, [2, 1, 5, 3], long=300), [0, 1, 2, 3], "groups", 0)
    trees = plant(micro.to(CUDA), 0, packed=True)
    s, width = packed.sequences(trees), trees.input_ids.shape[1]
    torch.manual_seed(0)
    q, k, v = (torch.randn(width, h, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    made = packed.varlen(q, k[s.gather], v[s.gather], s, 0.2, window)
    upstream = torch.randn_like(made)
    got = torch.autograd.grad(made, (q, k, v), upstream)
    cpu = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    cpu_s = packed.sequences(plant(micro, 0, packed=True))
    wanted = packed.varlen(cpu[0], cpu[1][cpu_s.gather], cpu[2][cpu_s.gather], cpu_s, 0.2, window)
    torch.testing.assert_close(made.cpu().double(), wanted, atol=2e-2, rtol=2e-2)
    for g, w in zip(got, torch.autograd.grad(wanted, cpu, upstream.cpu().double()), strict=True):
        assert (g.cpu().double() - w).norm() < 0.02 * w.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_packed_rows_equal_padded_rows(family, lora, checkpointing, kernel, tmp_path):
    if family == "gemma2" and kernel == "varlen":
        pytest.skip("capped scores are flex's")
    p = model(save_model(tmp_path, family, **SHAPE), lora=lora, attention=kernel, gradient_checkpointing=checkpointing)
    assert p.scoring == f"shared prompts packed ({kernel}), chunked logits"
    p = stir(p).train()
    micro = batch(p, rows(0, [2, 1, 5, 3])).to(CUDA)
    upstream = torch.linspace(0.5, 1, int(micro.layout.lengths.sum()), device=CUDA)
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    slow, slow_gradients = plain(p)(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=0.1, rtol=0.02)
    close(fast_gradients, slow_gradients, 0.1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_flex_in_fp32_equals_padded_rows(family, tmp_path):
    """To rounding, which bf16 hides."""
    p = model(save_model(tmp_path, family, **SHAPE), precision="fp32", attention="flex").train()
    assert p.layout == "packed"
    micro = batch(p, rows(0, [2, 1, 5, 3])).to(CUDA)
    upstream = torch.linspace(0.5, 1, int(micro.layout.lengths.sum()), device=CUDA)
    fast, fast_gradients = p(micro).detach(), gradients(p, micro, upstream)
    slow, slow_gradients = plain(p)(micro).detach(), gradients(p, micro, upstream)
    torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3)
    close(fast_gradients, slow_gradients, 1e-2)


def test_auto_on_a_gpu(tmp_path):
    folder = save_model(tmp_path / "llama", "llama", **SHAPE)
    best = "varlen" if packed.has_varlen(CUDA) else "flex"
    assert model(folder, attention="auto").scoring == f"shared prompts packed ({best}), chunked logits"
    assert model(folder, attention="auto", precision="fp32").layout == "trees"
    assert model(save_model(tmp_path / "gemma2", "gemma2", **SHAPE), attention="auto").kernel == "flex"


def test_rewards_and_sampling(kernel, tmp_path):
    folder = save_model(tmp_path, "mistral", **SHAPE)
    reward = model(folder, RewardModel, attention=kernel).eval()
    assert reward.layout == "packed"
    micro = batch(reward, rows(0, [2, 1, 5, 3])).to(CUDA)
    with torch.no_grad():
        fast = reward(micro)
        reward.layout = "rows"
        torch.testing.assert_close(fast, reward(micro), atol=0.02, rtol=0.02)
    prompts, settings = [[5, 6, 7], [8, 9, 10]], SamplerConfig(max_new_tokens=8, temperature=0.0)
    made, wanted = (model(folder, attention=a).generate(prompts, settings, seed=0) for a in (kernel, "sdpa"))
    assert [r.ids for r in made] == [r.ids for r in wanted]


@torch.no_grad()
def test_a_row_never_changes_another_rows_log_probs_by_a_bit(kernel, tmp_path):
    from tests.unit.test_packed import other

    p = model(save_model(tmp_path, "llama", **SHAPE), attention=kernel).eval()
    made = rows(1, [3, 2, 4])
    tokens = [sum(b.trained for b in r.tokens.branches) for r in made]
    before = p(batch(p, made).to(CUDA)).split(tokens)
    after = p(batch(p, [made[0], other(made[1], 5), made[2]]).to(CUDA)).split(tokens)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]) and not torch.equal(before[1], after[1])
