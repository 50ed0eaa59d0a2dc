"""SparsePO, TPO and SPO: what their papers say must hold, and the whole way from texts to a loss against plain sums."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from samples import floats, layout_of, random_layout, random_tokens, rankings, scored

from prefopt.config.schema import OptimConfig
from prefopt.data import bandit
from prefopt.data.batch import Row, build
from prefopt.data.dataset import make_dataset
from prefopt.data.sources import Split
from prefopt.data.steps import mark_steps, split_steps
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import Pairs, reduce_terms, total_weights
from prefopt.objectives.listwise import LiPO
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.self_supervised import SelfSupervisedPO
from prefopt.objectives.sparse import SparsePO
from prefopt.objectives.token_divergence import TDPO
from prefopt.objectives.tree import TreePO
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.training.engine import Engine
from tests import toy
from tests.toy_runs import fresh_accelerator, gradients

DROP = dict(l1_u=0.0, l1_d=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def loss_of(objective, layout, tokens) -> torch.Tensor:
    batch = scored(objective, layout, tokens)
    return reduce_terms(batch, objective(batch), total_weights(objective, layout))[0]


def engine_of(policy, objective, accelerator, lr=1e-2) -> Engine:
    """With a reference that is not the policy."""
    reference = make_reference(policy, "initial")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return Engine(policy, objective, reference, OptimConfig(lr=lr, warmup=0.0, max_grad_norm=1e9), accelerator)


# ---- SparsePO --------------------------------------------------------------------------------------------


def masked(objective, seed: int, reward: float, kl: float):
    """A layout and random scores, with masks that are the same for all tokens."""
    rng = random.Random(seed)
    layout = random_layout(objective, rng, 5)
    tokens = random_tokens(objective, layout, rng)
    count = len(layout.token_edge)
    tokens |= {"mask_reward": torch.full((count,), reward).double(), "mask_kl": torch.full((count,), kl).double()}
    tokens["divergence"] = floats(rng.uniform(0, 2) for _ in range(count))
    return layout, tokens


@pytest.mark.parametrize("seed", range(5))
def test_masks_of_one_are_tdpo1_and_without_the_divergence_it_is_dpo(seed):
    objective = SparsePO(beta=0.7, **DROP)
    layout, tokens = masked(objective, seed, 1.0, 1.0)
    want = loss_of(TDPO(beta=0.7, alpha=1.0, stop_gradient=False), layout, tokens)
    assert loss_of(objective, layout, tokens).item() == pytest.approx(want.item(), rel=1e-12)
    layout, tokens = masked(objective, seed, 1.0, 0.0)
    assert loss_of(objective, layout, tokens).item() == pytest.approx(loss_of(DPO(beta=0.7), layout, tokens).item(), rel=1e-12)


@pytest.mark.parametrize("k", [0.25, 3.0])
def test_masks_times_k_are_beta_times_k(k):
    layout, tokens = masked(SparsePO(), 1, k, k)
    one = tokens | {name: t / k for name, t in tokens.items() if name.startswith("mask")}
    got, want = loss_of(SparsePO(beta=0.2, **DROP), layout, tokens), loss_of(SparsePO(beta=0.2 * k, **DROP), layout, one)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_gradient_reaches_masks_and_divergence_on_both_sides():
    layout, tokens = masked(SparsePO(), 2, 0.5, 0.5)
    tokens = {name: t.requires_grad_() for name, t in tokens.items()}
    loss = loss_of(SparsePO(beta=1.0, common=False, l1_u=0.1), layout, tokens)
    grads = dict(zip(tokens, torch.autograd.grad(loss, tokens.values(), allow_unused=True), strict=True))
    chosen, rejected = layout.tokens_of(layout.pairs.chosen), layout.tokens_of(layout.pairs.rejected)
    for name in ("policy", "divergence", "mask_reward", "mask_kl"):
        assert grads[name][chosen].any() and grads[name][rejected].any(), name
    assert grads["reference"] is None or not grads["reference"].any()
    without = torch.autograd.grad(loss_of(SparsePO(beta=1.0, common=False, l1_u=0.0), layout, tokens), tokens["mask_reward"])[0]
    times = torch.zeros(len(layout.lengths), dtype=torch.float64)
    for edges in (layout.pairs.chosen, layout.pairs.rejected):
        times.index_add_(0, edges, layout.pairs.weight / layout.pairs.weight.sum())
    torch.testing.assert_close(grads["mask_reward"] - without, 0.1 * times[layout.token_edge])


@pytest.mark.parametrize("common", [True, False])
def test_sparsepo_on_a_language_model_against_a_plain_computation(folder, common):
    objective = SparsePO(beta=0.5, common=common, l1_u=0.01, l1_d=0.02)
    with fresh_accelerator() as accelerator:
        policy = toy.policy(folder)
        engine = engine_of(policy, objective, accelerator)
        examples = [toy.pair(), toy.pair(prompt="Is that so?", chosen="Two and two make four.", rejected="I am")]
        micro = toy.micro(policy, *examples)
        batch = engine.score(micro)
        terms = {t.name: t.values for t in objective(batch).terms}

        def plain(model, edge):
            row, trained = micro.input_ids[edge][micro.attention[edge]], micro.trained[edge][micro.attention[edge]].nonzero()[:, 0]
            with model.plainly():
                out = model.inner(input_ids=row[None], use_cache=False, output_hidden_states=True)
            logp = out.logits[0, trained - 1].double().log_softmax(-1)
            return logp, logp[torch.arange(len(trained)), row[trained]], torch.stack([h[0, trained - 1] for h in out.hidden_states[1:]], 1)

        total, size = [], []
        with torch.no_grad():
            for edge in range(4):
                (p, t, _), (q, s, layers) = plain(policy, edge), plain(engine.reference.frozen, edge)
                masks = [mask(layers).double() for mask in policy.owned.masks]
                kl = (q.exp() * (q - p)).sum(-1)
                total.append(0.5 * float((masks[0] * (t - s) + masks[-1] * kl).sum()))
                size.append(float((0.01 * masks[0] + 0.02 * masks[-1]).sum()) / (2 if common else 1))
    for pair in (0, 1):
        logit = total[2 * pair] - total[2 * pair + 1]
        assert terms["preference"][pair].item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-3)
        assert terms["sparsity"][pair].item() == pytest.approx(size[2 * pair] + size[2 * pair + 1], rel=1e-3)
    assert len(policy.owned.masks) == (1 if common else 2) and max(map(abs, total)) > 1e-3


def test_l1_drives_the_masks_to_zero(folder):
    with fresh_accelerator() as accelerator:
        policy = toy.policy(folder)
        engine = Engine(policy, SparsePO(common=False, l1_u=5.0, l1_d=5.0), make_reference(policy, "initial"),
                        OptimConfig(warmup=0.0), accelerator)
        micros = [toy.micro(policy, toy.pair(), toy.pair(prompt="Is that so?", chosen="Two and two make four.", rejected="I am"))]
        first = engine.step(micros, 5e-3).metrics
        for _ in range(199):
            last = engine.step(micros, 5e-3).metrics
            if min(last["mask_zeros/reward"], last["mask_zeros/kl"]) > 0.9:
                break
    assert max(first["mask_zeros/reward"], first["mask_zeros/kl"]) < 0.9
    assert min(last["mask_zeros/reward"], last["mask_zeros/kl"]) > 0.9


# ---- TPO -------------------------------------------------------------------------------------------------


def tree_of(objective, seed: int, units: int = 4):
    rng = random.Random(seed)
    layout = random_layout(objective, rng, units)
    return layout, random_tokens(objective, layout, rng)


@pytest.mark.parametrize("seed", range(5))
def test_without_step_weights_it_is_lipo(seed):
    layout, tokens = tree_of(TreePO(), seed)
    got = loss_of(TreePO(beta=0.3, adaptive=False), layout, tokens)
    assert got.item() == pytest.approx(loss_of(LiPO(beta=0.3), layout, tokens).item(), rel=1e-9)
    got = loss_of(TreePO(beta=0.3, adaptive=False, lambdarank=False), layout, tokens)
    assert got.item() == pytest.approx(loss_of(LiPO(beta=0.3, loss="dpo_bt"), layout, tokens).item(), rel=1e-9)


def test_a_list_of_two_without_weights_is_dpo():
    tokens = {s: floats(-random.Random(s).uniform(0.1, 2) for _ in range(7)) for s in ("policy", "reference")}
    two = layout_of([3, 4], ranking=rankings([[(0, 1.0), (1, 0.0)]], floats([1])))
    one = floats([1])
    pair = layout_of([3, 4], pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, 0 * one))
    got = loss_of(TreePO(beta=0.3, adaptive=False, lambdarank=False), two, tokens)
    assert got.item() == pytest.approx(loss_of(DPO(beta=0.3), pair, tokens).item(), rel=1e-12)


@pytest.mark.parametrize("lambdarank", [True, False])
def test_the_loss_falls_as_the_best_branch_becomes_likelier(lambdarank):
    objective = TreePO(lambdarank=lambdarank)
    layout, tokens = tree_of(objective, 7, units=1)
    best = layout.ranking.edge[layout.ranking.best]
    likelier = layout.tokens_of(best)
    losses = [loss_of(objective, layout, tokens | {"policy": tokens["policy"] + up * likelier}).item() for up in (0, 1e-4, 2e-4)]
    assert losses[0] > losses[1] > losses[2]


def test_identical_branches_have_equal_rewards_and_gradients():
    objective, per_token = TreePO(lambdarank=False), [-0.5, -1.0, -0.25]
    layout = layout_of([3, 3], ranking=rankings([[(0, 1.0), (1, 0.0)]], floats([1])), step=torch.tensor([0, 0, 1] * 2))
    tokens = {"policy": floats(per_token * 2).requires_grad_(), "reference": floats([-1.0, -1.5, -0.5] * 2)}
    rewards = objective.rewards(scored(objective, layout, tokens))
    assert rewards[0] == rewards[1] != 0
    (grad,) = torch.autograd.grad(loss_of(objective, layout, tokens), tokens["policy"])
    torch.testing.assert_close(grad[:3], -grad[3:])
    assert (grad[:3] < 0).all()


def test_steps_that_others_lack_belong_to_the_last_common_one():
    """Two branches of three and of two steps; the hidden states make the weights easy: 1 + cos is 2, 1 or 0."""
    layout = layout_of([3, 2], ranking=rankings([[(0, 1.0), (1, 0.0)]], floats([1])), step=torch.tensor([0, 1, 2, 0, 1]))
    hidden = torch.tensor([[1.0, 0], [0, 2], [0, 1], [-1, 0], [3, 0]], dtype=torch.float64)
    tokens = {"policy": floats([1, 2, 4, 8, 16]), "reference": floats([0] * 5), "hidden": hidden}
    objective = TreePO(beta=1.0)
    assert objective.rewards(scored(objective, layout, tokens)).tolist() == pytest.approx([2 * 1 + 2 * (2 + 4), 0 * 8 + 1 * 16])


@pytest.mark.parametrize("passes", [True, False])
def test_gradient_passes_through_the_likeness_only_if_asked(passes):
    objective = TreePO(hidden_gradient=passes)
    layout, tokens = tree_of(objective, 3)
    tokens["hidden"] = torch.randn(len(layout.token_edge), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = {name: t.requires_grad_() for name, t in tokens.items()}
    loss = loss_of(objective, layout, tokens)
    _, hidden = torch.autograd.grad(loss, (tokens["policy"], tokens["hidden"]), allow_unused=True)
    assert (hidden is not None and bool(hidden.any())) == passes
    if passes:
        def of(states):
            return loss_of(objective, layout, tokens | {"hidden": states})

        assert torch.autograd.gradcheck(of, (tokens["hidden"],), atol=1e-6)


TREE = dict(
    prompt="How are you?", scores=[3.0, 1.0, -2.0],
    completions=[["I am well.", "Two and two make four.", "Thank you."], "I am well.\nHello there", ["Hello there."]],
)


def test_tpo_on_a_language_model_against_a_plain_computation(folder):
    objective = TreePO(beta=0.5, lambdarank=False)
    with fresh_accelerator() as accelerator:
        policy = toy.policy(folder)
        engine = engine_of(policy, objective, accelerator)
        example = toy.example(**{**TREE, "completions": TREE["completions"][:2] + ["Two and two.\nHello there"]})
        mark_steps([example])
        rows = [Row(policy.tokenise(example), "ranking_all", scores=[3.0, 1.0, -2.0])]
        micro = build(rows, [0], "ranking", policy.pad)
        batch = engine.score(micro)
        (term,) = objective(batch).terms
        assert batch.step.unique().tolist() == [0, 1, 2]
        sums, states = [], []
        with torch.no_grad():
            for edge in range(3):
                ids, trained = micro.input_ids[edge][micro.attention[edge]], micro.trained[edge][micro.attention[edge]]
                places = trained.nonzero()[:, 0]
                with policy.plainly():
                    hidden = policy.inner(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0, places - 1]
                ratios = [a - b for a, b in zip(*(toy.oracle(m, ids.tolist(), trained.tolist())
                                                  for m in (policy, engine.reference.frozen)), strict=True)]
                step = batch.step[batch.token_edge == edge].clamp(max=1)  # the shortest branches have two
                states.append([hidden[step == k].mean(0) for k in (0, 1)])
                sums.append([sum(r for r, k in zip(ratios, step.tolist(), strict=True) if k == j) for j in (0, 1)])
    s = [0.5 * sum((1 + float(torch.cosine_similarity(states[i][k], states[0][k], dim=0))) * sums[i][k] for k in (0, 1)) for i in range(3)]
    want = sum(math.log1p(math.exp(s[j] - s[i])) for i in range(3) for j in range(i + 1, 3))
    assert term.values.item() == pytest.approx(want, rel=1e-3) and max(map(abs, s)) > 1e-3


# ---- steps of texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "steps"), [
    ("One. Two!  Three?", ["One. ", "Two!  ", "Three?"]),
    ("One. Two.\nThree.", ["One. Two.\n", "Three."]),
    ("One.\nTwo.\n \n\nThree.", ["One.\nTwo.\n \n\n", "Three."]),
    ("3.5 apples", ["3.5 apples"]),
    ("\n\nOne.\n\n", ["\n\nOne.\n\n"]),
])
def test_texts_are_cut_into_paragraphs_or_lines_or_sentences(text, steps):
    assert split_steps(text) == steps and "".join(steps) == text


def step_texts(tokeniser, branch) -> list[str]:
    """The text of each step of a reply, without what the template adds."""
    special = set(tokeniser.tokenizer.all_special_ids) | tokeniser.ends
    ids = [[t for t, k, m in zip(branch.ids, branch.steps, branch.mask, strict=True) if m and k == step and t not in special]
           for step in sorted(set(branch.steps))]
    return [tokeniser.tokenizer.decode(own).strip() for own in ids]


@pytest.mark.parametrize("template", [*(t for t in toy.TEMPLATES if t != "two_bos" and t != "opens_thought"), None])
def test_every_token_knows_its_step_under_every_template(template):
    tokeniser, example = toy.tokeniser("bytes", template), toy.example(**TREE)
    mark_steps([example])
    branches = tokeniser(example).branches
    want = [["I am well.", "Two and two make four.", "Thank you."], ["I am well.", "Hello there"], ["Hello there."]]
    for branch, texts in zip(branches, want, strict=True):
        first, *others = step_texts(tokeniser, branch)
        assert first.endswith(texts[0]) and others == texts[1:]  # some templates begin a reply with an empty thought
        assert len(branch.steps) == len(branch.ids) and branch.steps == sorted(branch.steps)
        assert branch.steps[-1] == len(texts) - 1  # the end of the reply is part of its last step


def test_steps_cost_nothing_where_they_are_not_asked_for():
    tokeniser, example = toy.tokeniser("bytes", "chatml"), toy.example(**TREE)
    assert all(branch.steps is None for branch in tokeniser(example).branches)
    row = Row(tokeniser(example), "ranking_all", scores=[3.0, 1.0, -2.0])
    assert build([row], [0], "ranking", 0).layout.step is None


def test_a_list_of_texts_is_the_text_of_its_lines():
    as_list, as_text = (toy.example(prompt="How?", chosen=chosen, rejected="No.") for chosen in (["One.", "Two."], "One.\nTwo."))
    assert as_list.completions[0].text == as_text.completions[0].text
    tokeniser = toy.tokeniser("bytes", "chatml")
    assert tokeniser(as_list) == tokeniser(as_text)


def test_steps_of_several_turns_and_of_a_cut_reply():
    messages = [{"role": "assistant", "content": "Hello there. I am well."}, {"role": "user", "content": "I am well."},
                {"role": "assistant", "content": "Two and two."}]
    example = toy.example(prompt="How are you?", completions=[messages, "I am"], scores=[1, 0])
    mark_steps([example])
    tokeniser = toy.tokeniser("bytes", "chatml")
    branch = tokeniser(example).branches[0]
    assert step_texts(tokeniser, branch) == ["Hello there.", "I am well.", "Two and two."]
    cut = toy.tokeniser("bytes", "chatml", max_completion_tokens=5)(example).branches[0]
    assert len(cut.steps) == len(cut.ids) == 5
    micro = build([Row(tokeniser(example), "ranking_all", scores=[1.0, 0.0])], [0], "ranking", 0)
    step, of = micro.layout.step, micro.layout.token_edge
    assert step[of == 0].unique().tolist() == [0, 1, 2] and step[of == 1].unique().tolist() == [0]


# ---- SPO -------------------------------------------------------------------------------------------------


REPLIES = ("The capital of France is Paris, a lovely old city.", "A fox and a bear told long stories about green hills.",
           "Warm bread with honey tastes better than cold soup.", "Seven ships sailed slowly past the quiet harbour wall.")


def degraded_rows(policy, objective):
    examples = [toy.pair(prompt="Is that so?", chosen=a, rejected=b) for a in REPLIES for b in REPLIES if a != b]
    cfg = toy.data_config()
    return make_dataset(Split("train", examples), cfg, policy.tokenise, "pairs", objective.columns, False, 0, extra=objective.extra).rows


def test_gamma_0_is_the_base_bit_for_bit_and_the_heads_get_no_gradient(folder):
    found = {}
    for name, objective in (("base", DPO(beta=0.3)), ("spo", SelfSupervisedPO(beta=0.3, gamma=0.0))):
        with fresh_accelerator() as accelerator:
            policy = toy.policy(folder)
            engine = engine_of(policy, SelfSupervisedPO(), accelerator)  # the same batch, scored in the same way
            micro = build(degraded_rows(policy, SelfSupervisedPO())[:4], range(4), "pairs", policy.pad)
            batch = engine.score(micro)
            loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, batch))
            grads = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True)
            found[name] = loss, dict(zip(policy.trainable(), grads, strict=True))
    (base, base_grads), (spo, spo_grads) = found["base"], found["spo"]
    assert torch.equal(base, spo)
    for name, grad in spo_grads.items():
        if name.startswith("owned."):
            assert not grad.any()
        else:
            assert torch.equal(grad, base_grads[name]), name


def test_gradients_of_the_degree_reach_the_policy_and_each_side_its_own_head(folder):
    with fresh_accelerator() as accelerator:
        policy = toy.policy(folder)
        engine = engine_of(policy, SelfSupervisedPO(gamma=1.0), accelerator)
        micro = build(degraded_rows(policy, SelfSupervisedPO())[:3], range(3), "pairs", policy.pad)
        batch = engine.score(micro)
        preference, degree = engine.objective(batch).terms
        assert preference.values.shape == degree.values.shape == (3,) and batch.pairs.extra.shape == (3, 4)
        # by hand: pooled states, the head of each side, cross-entropy of the six versions
        logits, layout = batch.scores["policy"]["degree_logits"], batch
        with torch.no_grad():
            hidden = policy(micro, replace(engine._asked(micro)[0][0], hidden=True))["hidden"]
        pair = 1
        sides = ([int(layout.pairs.chosen[pair]), *layout.pairs.extra[pair, :2].tolist()],
                 [int(layout.pairs.rejected[pair]), *layout.pairs.extra[pair, 2:].tolist()])
        want = []
        for side, versions in enumerate(sides):
            for k, edge in enumerate(versions):
                z = policy.owned.heads[side](hidden[layout.token_edge == edge].mean(0))
                torch.testing.assert_close(z, logits[edge, side], rtol=1e-4, atol=1e-5)
                want.append((z.logsumexp(0) - z[k]).item())
        assert degree.values[pair].item() == pytest.approx(sum(want) / 6, rel=1e-4)
        seen, _ = gradients(engine, [micro])
    assert all(seen[name].any() for name in seen if name.startswith("owned.") or "q_proj" in name)


def test_the_degree_is_learnt(folder):
    """20 points above chance, on rows that it trains on, within 200 steps."""
    with fresh_accelerator() as accelerator:
        policy = toy.policy(folder)
        objective = SelfSupervisedPO(gamma=1.0)
        engine = Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(warmup=0.0), accelerator)
        rows = degraded_rows(policy, objective)
        micros = [build(rows, range(len(rows)), "pairs", policy.pad)]
        first = engine.step(micros, 3e-3).metrics["degree_accuracy"]
        for _ in range(199):
            last = engine.step(micros, 3e-3).metrics["degree_accuracy"]
            if last > 1 / 3 + 0.2:
                break
    assert first < last and last > 1 / 3 + 0.2


# ---- on the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [SparsePO(beta=1.0, **DROP), SparsePO(beta=1.0, mask="activations"), TreePO(beta=1.0)],
                         ids=["sparsepo", "sparsepo_mapo", "tpo_tree"])
def test_it_learns_what_is_preferred_in_the_bandit_world(objective):
    pairs = [(x, a, b) for x, rewards in enumerate(bandit.reward_table()) for a in range(bandit.REPLIES) for b in range(bandit.REPLIES)
             if rewards[a] > rewards[b]]
    rows = [Row(Tokens([x], [Branch([y], [True], True) for y in (a, b)]), "pair") for x, a, b in pairs]
    with fresh_accelerator() as accelerator:
        policy = Tabular(torch.device("cpu"))
        engine = Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(warmup=0.0, max_grad_norm=1e9), accelerator)
        micros = [build(rows, range(len(rows)), objective.view, 0)]
        accuracy = [engine.step(micros, 0.1).metrics["accuracy"] for _ in range(150)]
    assert accuracy[0] == 0.5 and accuracy[-1] == 1
    if getattr(objective, "mask", "") != "learned":  # a mask may grow in place of the policy
        assert policy.logits.argmax(-1).tolist() == [max(range(bandit.REPLIES), key=r.__getitem__) for r in bandit.reward_table()]
