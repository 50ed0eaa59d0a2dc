"""model.compile=true: the same log-probs, noises and gradients from compiled layers, of the same names. Small models keep it to seconds."""

from __future__ import annotations

import copy
import functools
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prefopt.config.schema import SamplerConfig
from prefopt.data.batch import build
from prefopt.errors import UserError
from prefopt.policies.compiled import compile_layers
from prefopt.policies.denoisers import open_denoiser
from tests.tiny_pipelines import PROMPT, condition, folders, noisy
from tests.toy import pair, policy, rows, save_model

needs_compiler = pytest.mark.skipif(not any(shutil.which(c) for c in (os.environ.get("CXX") or "", "g++", "clang++")),
                                    reason="no C++ compiler, which torch.compile needs on a CPU")
LORA = {"enabled": True, "r": 2, "targets": "lm_head, q_proj, down_proj"}


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    return folders(tmp_path_factory)


@needs_compiler
@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA and checkpointing"])
def test_compiled_layers_compute_what_the_others_do(tmp_path, adapters, monkeypatch):
    """With shared prompts, for several lengths; in copies for a reference; in sampling; and they are saved as usual.

    The second case stops short of making C++ of what was traced, which takes half a minute: what adapters and recomputation could break
    is the tracing and the splitting into forward and backward pass.
    """
    if adapters:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    plain, fast = (policy(folder, lora=LORA if adapters else None, gradient_checkpointing=adapters, compile=on) for on in (False, True))
    assert fast.scoring == "shared prompts in trees (sdpa), compiled layers, chunked logits"
    assert list(fast.state_dict()) == list(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(plain.trainable().values(), fast.trainable().values(), strict=True):
        a.data = torch.randn(a.shape, generator=generator) / 4
        b.data = a.data.clone()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for texts in (["I am well.", "How?"], ["Two and two make four; three and three make six.", "So?", "Paris."]):
        micro = build(rows(fast, *(pair(chosen=text) for text in texts)), range(len(texts)), "pairs", fast.pad)
        made, want = fast(micro), plain(micro)
        torch.testing.assert_close(made, want, rtol=1e-5, atol=1e-5)
        upstream = torch.linspace(-1, 2, len(made))
        for a, b in zip(*(torch.autograd.grad(out @ upstream, list(p.trainable().values())) for out, p in ((made, fast), (want, plain))),
                        strict=True):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs  # so that this compared two different things
    twin = copy.deepcopy(fast).eval()
    assert all(layer._compiled_call_impl is not None for layer in twin.decoder.layers)
    with torch.no_grad():
        torch.testing.assert_close(twin(micro), want.detach(), rtol=1e-5, atol=1e-5)
    sampler = SamplerConfig(temperature=0.0, max_new_tokens=4)
    prompts = [fast.tokenise(pair()).prompt]
    assert [r.ids for r in fast.generate(prompts, sampler, 0)] == [r.ids for r in plain.generate(prompts, sampler, 0)]
    for p, name in ((plain, "plain"), (fast, "fast")):
        p.save(tmp_path / name)
    saved = [load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("plain", "fast")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])


RAN = []


def traced(graph, inputs):
    """aot_eager, with a count of the calls. One for all tests, so that they share what was traced."""
    run = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def counted(*values):
        RAN.append(graph)
        return run(*values)

    return counted


@needs_compiler
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_compiled_blocks_of_pictures_compute_what_the_others_do(pipelines, checkpointing, monkeypatch):
    """Predictions and gradients, in batches of two sizes. It stops short of C++, as above; sd3 passes as well,
    but takes twice as long to trace."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced))
    folder = pipelines("sd15")
    plain, fast = (open_denoiser(folder, gradient_checkpointing=checkpointing, compile=on) for on in (False, True))
    assert list(fast.network.state_dict()) == list(plain.network.state_dict())
    for texts in ((PROMPT, ""), (PROMPT, "a blue square", "")):
        cond, (x, t) = condition(folder, *texts), noisy(plain, len(texts))
        RAN.clear()
        made, want = fast.predict(x, t, cond), plain.predict(x, t, cond)
        forward = len(RAN)
        torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-4)
        upstream = torch.linspace(-1, 2, made.numel()).view(made.shape)
        grads = []
        for out, denoiser in ((made, fast), (want, plain)):
            denoiser.network.zero_grad()
            (out * upstream).sum().backward()
            grads.append({name: p.grad for name, p in denoiser.network.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
        for name, grad in grads[1].items():
            torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-4 * max(1, float(grad.abs().max())))
        assert len(RAN) == (2 if checkpointing else 1) * forward > 0  # so that this compared two different things


def test_without_a_compiler_it_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"model.compile=true needs a C\+\+ compiler"):
        policy(save_model(tmp_path, "llama"), compile=True)


@needs_compiler
def test_the_cpu_s_packed_rows_are_not_compiled(tmp_path):
    with pytest.raises(UserError, match="model.compile=true does not go with model.attention=varlen on a CPU"):
        policy(save_model(tmp_path, "llama"), compile=True, attention="varlen")


def test_layers_that_cannot_be_told_are_refused():
    with pytest.raises(UserError, match="the layers of Linear are not in one list"):
        compile_layers(torch.nn.Linear(2, 2), torch.device("cpu"))
