"""Hidden states that a policy hands out, and modules that objectives train beside it: layouts, seeds, optimiser, checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from prefopt.config.schema import OptimConfig
from prefopt.data.batch import MicroBatch
from prefopt.objectives.base import About, Batch
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.sparse import ActivationMask, LearnedMask, SparsePO
from prefopt.policies.asked import Asked
from prefopt.policies.owned import give_module
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.training import checkpoint
from prefopt.training.engine import Engine, parameter_groups
from tests import toy
from tests.toy_runs import fresh_accelerator, train

ASKED = Asked(states=True, layers=True, hidden=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def micro_of(policy) -> MicroBatch:
    return toy.micro(policy, toy.pair(), toy.pair(prompt="Is that so?", chosen="Two and two make four.", rejected="I am"))


# ---- hidden states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_states_are_those_that_transformers_gives_one_sequence(family, tmp_path):
    policy = toy.policy(toy.save_model(tmp_path / family, family)).eval()
    micro, hidden, layers = micro_of(policy), [], []
    with torch.no_grad():
        said = policy(micro, ASKED)
        for ids, attention, trained in zip(micro.input_ids, micro.attention, micro.trained, strict=True):
            row = ids[attention][None]
            with policy.plainly():
                states = policy.inner(input_ids=row, use_cache=False, output_hidden_states=True).hidden_states
            predict = trained[attention].nonzero()[:, 0] - 1
            layers.append(torch.stack([state[0, predict] for state in states[1:]], 1))
            hidden.append(states[-1][0, predict])
    assert said["hidden"].shape == (int(micro.layout.lengths.sum()), policy.about.hidden)
    assert said["states"].layers.shape[1] == policy.about.layers
    torch.testing.assert_close(said["hidden"], torch.cat(hidden), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(said["states"].layers, torch.cat(layers), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(said["states"].layers[:, -1], said["hidden"])


@pytest.mark.parametrize("layout", ["rows", "trees", "packed"])
def test_states_are_the_same_in_every_layout(folder, layout):
    fast = layout != "rows"
    policy = toy.policy(folder, share_prompts=fast, attention="varlen" if layout == "packed" else "sdpa")
    plain = toy.policy(folder, share_prompts=False, fused_head=False, attention="sdpa")
    assert policy.layout == layout and plain.layout == "rows"
    micro = micro_of(policy)
    made, want = policy(micro, ASKED), plain(micro, ASKED)
    torch.testing.assert_close(made["hidden"], want["hidden"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made["states"].layers, want["states"].layers, rtol=1e-3, atol=1e-4)
    assert made["hidden"].requires_grad and not made["states"].layers.requires_grad
    made["hidden"].square().sum().backward()
    want["hidden"].square().sum().backward()
    for (name, a), b in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_state_of_the_bandit_is_which_prompt_it_is():
    policy = Tabular(torch.device("cpu"))
    from prefopt.data.batch import Row, build
    from prefopt.data.tokenise import Branch, Tokens

    rows = [Row(Tokens([x], [Branch([0], [True], True), Branch([2], [True], True)]), "pair") for x in (3, 1)]
    said = policy(build(rows, [0, 1], "pairs", 0), ASKED)
    assert said["hidden"].argmax(-1).tolist() == [3, 3, 1, 1] and (said["hidden"].sum(-1) == 1).all()
    assert said["states"].layers.shape == (4, policy.about.layers, policy.about.hidden)


# ---- the masks -------------------------------------------------------------------------------------------


def test_the_learned_mask_is_its_equation():
    torch.manual_seed(0)
    mask, layers = LearnedMask(About(5, 3), 0.0), torch.randn(7, 3, 5)
    made = mask(layers).tolist()
    for token, states in enumerate(layers.tolist()):
        total = 0.0
        for layer, state in enumerate(states):
            middle = sum(state) / 5
            spread = (sum((x - middle) ** 2 for x in state) / 5 + mask.norm.eps) ** 0.5
            inner = sum(w * (x - middle) / spread for w, x in zip(mask.weight[layer].tolist(), state, strict=True))
            total += mask.mixer[layer].item() * max(0.0, inner + mask.bias[layer].item())
        assert made[token] == pytest.approx(max(0.0, total), abs=1e-5)
    assert any(made) and (mask.mixer >= 0).all()


def test_dropout_of_the_mask_is_for_training_only():
    mask, layers = LearnedMask(About(5, 2), 0.5), torch.randn(200, 2, 5)
    mask.eval()
    assert torch.equal(mask(layers), mask(layers))
    mask.train()
    assert not torch.equal(mask(layers), mask(layers))


def test_the_activation_mask_is_rescaled_within_each_reply_and_averaged_over_layers():
    layout = Batch(torch.tensor([3, 1, 2]), torch.tensor([0, 0, 0, 1, 2, 2]), {})
    means = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 3.0], [9.0, 9.0], [0.0, 1.0], [-2.0, 1.0]])
    layers = (means[..., None] + torch.tensor([-1.0, 0.0, 1.0])).requires_grad_()
    made = ActivationMask()(layout, layers[:, -1], layers)
    want = [(0 + 1) / 2, (1 + 0.5) / 2, (0.5 + 0) / 2, 1, (1 + 1) / 2, (0 + 1) / 2]  # a layer that says nothing counts 1
    assert made["mask_reward"].tolist() == pytest.approx(want) and made["mask_kl"] is made["mask_reward"]
    assert not made["mask_reward"].requires_grad


@pytest.mark.parametrize(("common", "count"), [(True, 1), (False, 2)])
def test_common_and_independent_masks(common, count):
    torch.manual_seed(0)
    module = SparsePO(common=common).build(About(6, 2))
    layout = Batch(torch.tensor([4]), torch.zeros(4, dtype=torch.long), {})
    made = module(layout, torch.zeros(4, 6), torch.randn(4, 2, 6))
    assert len(module.masks) == count and (made["mask_reward"] is made["mask_kl"]) == common


# ---- where the module lives --------------------------------------------------------------------------------


def test_the_module_follows_from_the_seed_and_leaves_the_global_state_alone(folder):
    policies = [toy.policy(folder) for _ in range(3)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for policy, seed in zip(policies, (1, 1, 2), strict=True):
        give_module(policy, SparsePO(), seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = ([p for n, p in policy.trainable().items() if n.startswith("owned.")] for policy in policies)
    assert first and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    give_module(policies[0], DPO(), 1)
    assert not hasattr(policies[0], "owned")


def test_it_is_trained_and_saved_with_no_model_and_copied_by_no_reference(folder, tmp_path):
    policy = toy.policy(folder)
    before = toy.policy(folder)
    reference = make_reference(policy, "initial", moves=True)
    give_module(policy, SparsePO(weight_decay=0.25), 0)
    own = {n for n in policy.trainable() if n.startswith("owned.")}
    assert own
    groups = parameter_groups(policy, 0.5)
    assert {g["weight_decay"]: len(g["params"]) for g in groups}[0.25] == len(own)
    assert sum(len(g["params"]) for g in groups) == len(policy.trainable())
    assert not any(n.startswith("owned.") for n in reference.state())
    reference.refresh()
    policy.save(tmp_path / "saved")
    before.save(tmp_path / "plain")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()


@pytest.mark.usefixtures("tiny_lm")
def test_a_killed_run_with_a_module_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """With dropout in the module, so that its random numbers count too."""
    command = ["algo=sparsepo", "algo.dropout=0.2", "algo.common=false", "train.steps=6", "train.save_every=3", "train.eval_every=6"]
    assert train(tmp_path / "whole", *command) == 0
    real, calls = Engine.step, []

    def stepping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise SystemError("killed")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(SystemError):
            train(tmp_path / "killed", *command)
    assert train(tmp_path / "killed", *command) == 0
    last = [checkpoint.steps(tmp_path / name / "checkpoints")[-1] for name in ("whole", "killed")]
    whole, killed = (load_file(path / "weights.safetensors") for path in last)
    assert whole.keys() == killed.keys() and any(n.startswith("owned.") for n in whole)
    assert all(torch.equal(whole[n], killed[n]) for n in whole)
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert not any("owned" in n for n in saved)


def test_a_module_learns_with_the_policy(folder):
    with fresh_accelerator() as accelerator:
        policy = toy.policy(folder)
        reference = make_reference(policy, "initial")
        engine = Engine(policy, SparsePO(beta=1.0), reference, OptimConfig(lr=1e-2, warmup=0.0), accelerator, seed=3)
        micros = [micro_of(policy)]
        start = {n: p.detach().clone() for n, p in policy.trainable().items()}
        losses = [engine.step(micros, 1e-2).loss for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in policy.trainable().items() if n.startswith("owned.") or "q_proj" in n)
