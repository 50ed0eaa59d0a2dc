"""FLOPs counted by hand, against torch's own counter and against arithmetic; peaks of devices."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from prefopt.config.schema import HardwareConfig
from prefopt.policies import flops
from prefopt.policies.flops import ModelShape, Work, causal_context, padded_work, peak_flops, row_work, shape_of, tree_work
from tests.toy import FAMILIES

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}


def config_of(family: str):
    kind, extra = FAMILIES[family]
    name = f"{kind}TextConfig" if family == "gemma3" else f"{kind}Config"
    return getattr(transformers, name)(**{**SMALL, **extra})


# torch's counter knows the GPU's attention kernels and passes the CPU's over in silence; its formulas are the same.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def counted(model, backward: bool, **inputs) -> int:
    """FLOPs by torch's counter. It counts attention as dense: width^2 products, whatever the mask."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        logits = model(**inputs, use_cache=False).logits
        if backward:
            logits.float().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "tree mask"])
def test_forward_and_backward_are_what_torch_counts(family, masked):
    config, rows, width = config_of(family), 3, 12
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config)
    inputs = {"input_ids": torch.zeros(rows, width, dtype=torch.long)}
    if masked:
        mask = torch.ones(width, width, dtype=torch.bool).tril().expand(rows, 1, width, width)
        if family == "gemma2":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        kinds = set(getattr(config, "layer_types", None) or [])
        inputs["attention_mask"] = mask if kinds <= {"full_attention"} else dict.fromkeys(kinds, mask)
    shape, work = shape_of(config), padded_work(rows, width, rows * width, dense=True)
    forward, both = counted(model, False, **inputs), counted(model, True, **inputs)
    assert shape.forward(work) == forward
    # The flash kernel runs queries x keys once more in its backward pass: half of a forward pass of attention.
    flash = 0 if family == "gemma2" else shape.products(work) / 2
    assert math.isclose(both, shape.step(work) + flash, rel_tol=1e-12)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_model_counted_by_hand():
    """Trap 34: body and head of Llama-3-8B, and the figures of a pair of 180 + 300 + 290 tokens."""
    shape = shape_of(transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256))
    per_layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert (shape.body, shape.head, shape.attention, shape.layers) == (32 * per_layer, 128256 * 4096, 32 * 4096, 32)
    assert shape.parameters == 32 * (per_layer + 2 * 4096) + 4096 + 2 * shape.head
    work = tree_work(180, (300, 290), 590)
    triangle = (180 * 181 + 300 * 301 + 290 * 291) / 2 + 180 * 590
    assert work == Work(770, 590, triangle)
    forward = 2 * shape.body * 770 + 2 * shape.head * 590 + 4 * 4096 * 32 * triangle
    assert shape.forward(work) == forward
    assert shape.step(work) == 3 * forward
    assert shape.step(work) == pytest.approx(34.4e12, rel=0.01)  # per pair, in full fine-tuning
    assert shape.step(work, frozen=True) == forward * 2 + 4 * 4096 * 32 * triangle


def test_an_expert_counts_as_often_as_a_token_meets_it():
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1)
    dense = transformers.LlamaConfig(**SMALL)
    assert shape_of(config).body == shape_of(dense).body + 2 * 4 * 32  # the router of each layer on top
    assert shape_of(config).parameters > shape_of(dense).parameters + 2 * 3 * 3 * 32 * 48 - 1


@pytest.mark.parametrize(("start", "length", "window"), [(0, 7, None), (3, 5, None), (0, 9, 4), (2, 9, 4), (6, 3, 4), (0, 3, 4), (5, 0, 2)])
def test_contexts_are_sums_over_positions(start, length, window):
    limit = window or 10**9
    assert causal_context(start, length, window) == sum(min(i + 1, limit) for i in range(start, start + length))


def test_works_add_and_multiply():
    tree, row = tree_work(5, (3, 4), 7), row_work(9, 2)
    assert (tree + row).tokens == 12 + 9
    assert 2 * tree == tree + tree == tree * 2
    assert row_work(9, 2, window=4).windowed == causal_context(0, 9, 4)
    assert (tree_work(5, (3,), 3, window=4) + row).near == causal_context(0, 8, 4) + row.context
    assert sum([tree, row], Work()) == tree + row
    assert padded_work(2, 6, 5, dense=True) == Work(12, 5, 72)
    assert padded_work(2, 6, 5, dense=False) == Work(12, 5, 42)


def test_sliding_layers_cost_what_their_window_holds():
    shape = ModelShape(0, 0, attention=10, layers=2, hidden=1, vocabulary=1, parameters=0, sliding=10, window=4)
    assert shape.forward(row_work(9, 0, window=4)) == 4 * 10 * (45 + causal_context(0, 9, 4))


@pytest.mark.parametrize(("name", "bf16"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX A6000", 155), ("NVIDIA A10G", 70), ("NVIDIA GH200 480GB", 989),
])
def test_known_gpus_have_their_data_sheets_peak(name, bf16, monkeypatch):
    monkeypatch.setattr(flops, "measured_peak", lambda *a: pytest.fail("it is known"))
    assert peak_flops(HardwareConfig(), name, "bf16") == bf16 * 1e12
    assert peak_flops(HardwareConfig(), name, "fp32") < bf16 * 1e12
    assert peak_flops(HardwareConfig(peak_tflops=2.0), name, "bf16") == 2e12


def test_a_cpus_peak_is_measured_once():
    before = torch.random.get_rng_state()
    assert peak_flops(HardwareConfig(), "cpu", "fp32") > 1e8
    assert peak_flops(HardwareConfig(), "cpu", "fp32") == peak_flops(HardwareConfig(), "cpu", "fp32")
    assert torch.equal(before, torch.random.get_rng_state())
