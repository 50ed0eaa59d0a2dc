"""TDPO, AlignDistil, TGDPO, TVKD on real models: loss and gradients are those of full logits in float64; teachers are learned from."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from samples import default, floats, layout_of, random_layout, random_tokens, scored, settings_of

from prefopt.config.schema import ColumnsConfig, DataConfig, OptimConfig, TrustConfig
from prefopt.data import bandit
from prefopt.data.batch import Row, build
from prefopt.data.dataset import make_dataset
from prefopt.data.sources import load_data
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import Pairs, reduce_terms, total_weights
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.teacher_guided import TGDPO
from prefopt.objectives.token_divergence import TDPO, AlignDistil
from prefopt.policies.causal_lm import CausalLM
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.policies.teacher import Teacher, live_teachers
from prefopt.training.engine import Engine
from prefopt.training.source import OfflineSource
from tests.toy import data_config, model_config, save_model
from tests.toy_runs import fresh_accelerator, gradients

SLUGS = ("tdpo", "tdpo1", "tgdpo", "tvkd", "tvkd_kl", "align_distil")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def model(folder, seed: int, attention: str = "auto") -> CausalLM:
    policy = CausalLM(model_config(folder, attention=attention), data_config(), TrustConfig(), CPU, "fp32", 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return policy.to(torch.float64)


def rows(count: int = 3) -> list[Row]:
    """Pairs with replies of several lengths, one of them with tokens in its middle that are not trained."""
    rng = random.Random(7)

    def reply(n):
        mask = [True] * n if n != 5 else [True, False, False, True, True]
        return Branch([rng.randint(4, 99) for _ in range(n)], mask, True)

    lengths = ((3, 5), (1, 4), (6, 2))
    return [Row(Tokens([rng.randint(4, 99) for _ in range(4 + i)], [reply(n) for n in lengths[i % 3]]), "pair") for i in range(count)]


def full_logp(policy, micro):
    """([N, V] log-probs of all words, [N] of the trained tokens) from the model's own logits, on padded rows."""
    with policy.plainly():
        logits = policy.model(input_ids=micro.input_ids, attention_mask=micro.attention.long(), use_cache=False).logits
    every = logits[:, :-1][micro.trained[:, 1:]].log_softmax(-1)
    return every, every.gather(-1, micro.input_ids[:, 1:][micro.trained[:, 1:]][:, None]).squeeze(-1)


def by_hand(slug: str, o, p, t, ref, guides, edges) -> torch.Tensor:
    """The mean loss over pairs, whose tokens are `edges` (slices of chosen and rejected), written out from log-probs of all words."""
    losses = []
    for w, l in edges:  # noqa: E741
        if slug in ("tdpo", "tdpo1"):
            drift = [(ref[0][e].exp() * (ref[0][e] - p[e])).sum() for e in (w, l)]
            first = drift[0] if slug == "tdpo1" else drift[0].detach()
            h = (t[w] - ref[1][w]).sum() - (t[l] - ref[1][l]).sum()
            losses.append(-F.logsigmoid(o.beta * (h - o.alpha * (drift[1] - first))))
        elif slug == "tgdpo":
            reward = o.beta * (guides[0][1] - ref[1])
            sides = [((1 + sign * o.alpha * reward[e]) * (t[e] - ref[1][e])).sum() for e, sign in ((w, 1), (l, -1))]
            losses.append(-F.logsigmoid(o.beta * (sides[0] - sides[1])))
        elif slug.startswith("tvkd"):
            value = o.temperature * ((guides[0][0].exp() ** (o.alpha / o.temperature)).sum(-1)).log()
            sides = [t[e].sum() - o.gamma * value[e][1:].sum() for e in (w, l)]
            loss = -F.logsigmoid(sides[0] - sides[1])
            if slug == "tvkd_kl":
                q = guides[0][0]
                loss = loss + o.kd_weight * sum((q[e].exp() * (q[e] - p[e])).sum(-1).mean() for e in (w, l))
            losses.append(loss)
        else:
            z, away = guides[0][0][w], guides[1][0][w]
            strength = o.beta2 * (z.exp() - away.exp()).abs().sum(-1) + 1e-3
            target = (z + strength[:, None] * (z - away)).log_softmax(-1)  # log-probs are logits too
            losses.append((o.beta / strength * (p[w].exp() * (p[w] - target)).sum(-1)).mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("slug", SLUGS)
def test_loss_and_gradients_are_those_of_full_logits(folder, slug):
    """Of every weight of the policy, through the engine, in two micro-batches; frozen models get none and do not change."""
    objective = default(slug)
    policy, data = model(folder, 1), rows()
    reference = model(folder, 2).eval()
    others = [model(folder, seed) for seed in (3, 4)]
    micro = build(data, range(3), "pairs", policy.pad)
    ends = micro.layout.lengths.cumsum(0).tolist()
    spans = [slice(end - n, end) for end, n in zip(ends, micro.layout.lengths.tolist(), strict=True)]
    p, t = full_logp(policy, micro)
    with torch.no_grad():
        ref, guides = full_logp(reference, micro), [full_logp(o, micro) for o in others]
    want = by_hand(slug, objective, p, t, ref, guides, list(zip(spans[::2], spans[1::2], strict=True)))
    expected = dict(zip(policy.trainable(), torch.autograd.grad(want, list(policy.trainable().values())), strict=True))
    parts = [build(data, chosen, "pairs", policy.pad) for chosen in ([0], [1, 2])]
    with fresh_accelerator() as accelerator:
        teacher = Teacher(objective, *others) if "teacher" in objective.quantities else None
        scorer = torch.no_grad()(reference) if "reference" in objective.quantities else None
        engine = Engine(policy, objective, scorer, OptimConfig(max_grad_norm=1e9), accelerator, teacher=teacher)
        made, loss = gradients(engine, parts)
    assert loss == pytest.approx(want.item(), rel=1e-6)
    assert sum(float(g.abs().sum()) for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-4, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert all(weight.grad is None for frozen in (reference, *others) for weight in frozen.parameters())


@pytest.mark.parametrize("slug", SLUGS)
def test_states_are_asked_for_where_they_are_needed(slug):
    """Log-probs alone can come from a store; whole distributions need the scorer itself."""
    objective = default(slug)
    wanted = {"tdpo": ("reference",), "tdpo1": ("reference",), "tvkd_kl": ("teacher",), "align_distil": ("teacher",)}
    assert objective.states_of == wanted.get(slug, ())
    live = {"tvkd_kl": 1, "align_distil": 2}
    assert live_teachers(objective, stored=True) == live.get(slug, 0)
    assert live_teachers(objective, stored=False) == (1 if slug in ("tgdpo", "tvkd") else live.get(slug, 0))


# ---- TDPO ------------------------------------------------------------------------------------------------


def test_first_and_second_version_differ_in_the_gradient_alone():
    """At alpha 1 the values are the same; the second holds the drift along chosen replies."""
    rng = random.Random(0)
    layout = random_layout(TDPO(), rng, 5)
    tokens, seen = random_tokens(TDPO(), layout, rng), []
    drift = floats(rng.uniform(0, 0.5) for _ in layout.token_edge)
    for stop in (True, False):
        objective, leaf = TDPO(alpha=1.0, stop_gradient=stop), drift.clone().requires_grad_()
        batch = scored(objective, layout, tokens | {"divergence": leaf})
        loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, layout))
        seen.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    (held, held_grad), (free, free_grad) = seen
    assert held == pytest.approx(free, abs=1e-12) and not torch.allclose(held_grad, free_grad)
    only_chosen = layout.tokens_of(layout.pairs.chosen) & ~layout.tokens_of(layout.pairs.rejected)
    assert only_chosen.any() and not held_grad[only_chosen].any() and free_grad[only_chosen].all()


def test_tdpo_at_0_is_dpo():
    rng = random.Random(1)
    layout = random_layout(DPO(), rng, 6)
    layout.pairs.label.fill_(1)
    tokens, seen = random_tokens(TDPO(), layout, rng), []
    for objective in (TDPO(beta=0.3, alpha=0.0), DPO(beta=0.3)):
        leaf = tokens["policy"].clone().requires_grad_()
        batch = scored(objective, layout, tokens | {"policy": leaf})
        loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, layout))
        seen.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-12)
    torch.testing.assert_close(seen[0][1], seen[1][1])


@pytest.mark.parametrize("slug", ["tdpo", "tdpo1"])
def test_tdpo_starts_at_ln_2_without_any_drift(folder, slug):
    """And its drift is above 0 after one step."""
    objective, policy = default(slug), model(folder, 1)
    micro = build(rows(), range(3), "pairs", policy.pad)
    with fresh_accelerator() as accelerator:
        engine = Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(lr=0.05, max_grad_norm=1e9), accelerator)
        start = engine.score(micro)
        assert objective(start).terms[0].values.tolist() == pytest.approx([0.693147] * 3, abs=1e-6)
        assert start.scores["policy"]["divergence"].abs().max() < 1e-9 and objective.rewards(start).abs().max() < 1e-6
        engine.step([micro], 0.05)
        drift = engine.score(micro).scores["policy"]["divergence"]
    assert (drift > 0).all() and drift.max() > 1e-4


# ---- teachers --------------------------------------------------------------------------------------------


def batch_of(objective, guide, count: int = 2):
    """A pair of three and two tokens; `guide`: the teacher's log-probs."""
    one = floats([1])
    layout = layout_of([3, 2], pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, 0 * one))
    leaf = floats([-1, -2, -0.5, -1.5, -0.7]).requires_grad_()
    reference = floats([-1.2, -1.5, -0.6, -1, -1])
    return scored(objective, layout, {"policy": leaf, "reference": reference, "teacher": guide}), leaf


def test_a_guide_like_the_reference_leaves_dpo():
    guide = floats([-1.2, -1.5, -0.6, -1, -1])
    batch, leaf = batch_of(TGDPO(beta=0.3, alpha=2.0), guide)
    (term,) = TGDPO(beta=0.3, alpha=2.0)(batch).terms
    plain = replace(batch, scores={s: {q: t for q, t in batch.scores[s].items() if q == "logp"} for s in ("policy", "reference")})
    (want,) = DPO(beta=0.3)(plain).terms
    assert term.values.item() == pytest.approx(want.values.item(), abs=1e-12)


def test_a_guide_with_shuffled_weights_changes_the_loss_and_not_who_learns(folder):
    """Gradients reach every weight of the policy, whatever the guide says, and none of the guide's."""
    guide, seen, generator = model(folder, 3), [], torch.Generator().manual_seed(0)
    for shuffled in (False, True):
        if shuffled:
            with torch.no_grad():
                for weight in guide.parameters():
                    weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
        objective, policy, reference = TGDPO(alpha=5.0), model(folder, 1), torch.no_grad()(model(folder, 2).eval())
        micro = build(rows(), range(3), "pairs", policy.pad)
        with fresh_accelerator() as accelerator:
            engine = Engine(policy, objective, reference, OptimConfig(max_grad_norm=1e9), accelerator, teacher=Teacher(objective, guide))
            made, loss = gradients(engine, [micro])
        seen.append((loss, {name for name, gradient in made.items() if gradient.any()}))
        assert all(weight.grad is None for weight in guide.parameters())
    (loss, learning), (other, also_learning) = seen
    assert abs(loss - other) > 1e-3 and learning == also_learning and learning


def test_tokens_that_the_guide_likes_count_more_in_chosen_replies():
    objective = TGDPO(beta=1.0, alpha=0.5)
    batch, leaf = batch_of(objective, floats([0.2, -1.5, -0.6, 0, -1]))  # likes the first token of both replies better than the reference
    (term,) = objective(batch).terms
    first, second, _, losing, other = torch.autograd.grad(term.values.sum(), leaf)[0].tolist()
    assert first < second < 0 and 0 < losing < other


def test_extrapolation_of_the_row():
    """d = 0.6 gives w = 6.001 at beta2 = 10; the plain form's strength is the same everywhere."""
    distance = floats([0.6, 0.0, 2.0])
    assert AlignDistil().extrapolation(distance)[0].tolist() == pytest.approx([6.001, 0.001, 20.001])
    for form, want in (("theorem1", [-0.5] * 3), ("theorem1_contrast", [0.5] * 3), ("theorem1_adaptive", [1.401, -0.999, 7.001])):
        assert AlignDistil(beta=2.0, beta2=4.0, form=form).extrapolation(distance)[0].tolist() == pytest.approx(want)


def test_theorem_1_at_equal_strengths_is_plain_distillation(folder):
    """beta = beta2: beta2 KL(pi || DPO model), whatever the second model is."""
    objective, policy, first, second = AlignDistil(beta=0.4, beta2=0.4, form="theorem1"), *(model(folder, s) for s in (1, 2, 3))
    micro = build(rows(), range(3), "pairs", policy.pad)
    with fresh_accelerator() as accelerator, torch.no_grad():
        batch = Engine(policy, objective, None, OptimConfig(), accelerator, teacher=Teacher(objective, first, second)).score(micro)
        p, q = full_logp(policy, micro)[0], full_logp(first, micro)[0]
        kl = batch.edge_sum((p.exp() * (p - q)).sum(-1)) / batch.lengths
        torch.testing.assert_close(objective(batch).terms[0].values, 0.4 * kl[batch.pairs.chosen], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive"])
def test_forms_and_temperature_are_those_of_full_logits(folder, form):
    objective, policy, *others = AlignDistil(beta=0.3, beta2=2.0, form=form, temperature=0.7), *(model(folder, s) for s in (1, 2, 3))
    micro = build(rows(), range(3), "pairs", policy.pad)
    with fresh_accelerator() as accelerator, torch.no_grad():
        batch = Engine(policy, objective, None, OptimConfig(), accelerator, teacher=Teacher(objective, *others)).score(micro)
        p, z, away = (full_logp(m, micro)[0] for m in (policy, *others))
        plain, adaptive = 0.3 / 2.0, (2.0 * (z.exp() - away.exp()).abs().sum(-1) + 1e-3)[:, None]
        logits, factor = {
            "aligndistil": (z + adaptive * (z - away), 0.3 / adaptive), "theorem1": (plain * z + (1 - plain) * away, 2.0),
            "theorem1_contrast": (z + plain * (z - away), 2.0), "theorem1_adaptive": (adaptive * z + (1 - adaptive) * away, 0.3 / adaptive),
        }[form]
        kl = (factor * p.exp() * (p - (logits / 0.7).log_softmax(-1))).sum(-1)
        want = (batch.edge_sum(kl) / batch.lengths)[batch.pairs.chosen]
        torch.testing.assert_close(objective(batch).terms[0].values, want, rtol=1e-5, atol=1e-8)


def test_the_teacher_itself_has_nothing_to_learn(folder):
    """Both teachers alike: w = 0.001, and a policy that is the DPO model has loss 0; any other (beta / 0.001) KL."""
    objective, policy, teacher, other = AlignDistil(), *(model(folder, s) for s in (1, 1, 2))
    micro = build(rows(), range(3), "pairs", policy.pad)
    with fresh_accelerator() as accelerator, torch.no_grad():
        engine = Engine(policy, objective, None, OptimConfig(), accelerator, teacher=Teacher(objective, teacher, teacher))
        same = engine.score(micro)
        assert same.scores["teacher"]["distance"].abs().max() < 1e-12
        assert objective(same).terms[0].values.abs().max() < 1e-6
        p, q = full_logp(policy, micro)[0], full_logp(other, micro)[0]
        engine.teacher = Teacher(objective, other, other)
        batch = engine.score(micro)
        kl = batch.edge_sum((p.exp() * (p - q)).sum(-1)) / batch.lengths
        torch.testing.assert_close(objective(batch).terms[0].values, 0.1 / 1e-3 * kl[batch.pairs.chosen], rtol=1e-5, atol=1e-8)


# ---- the bandit ------------------------------------------------------------------------------------------


def trained(slug: str, *teachers, steps: int = 80, lr: float = 0.05, swap: bool = False, **settings) -> torch.Tensor:
    """The table after full-batch training on every pair with its exact label; `swap`: on the pairs the other way round."""
    cls, values = settings_of(slug)
    objective, data = cls(**values | settings), DataConfig(name="bandit", source="bandit", columns=ColumnsConfig(), eval_limit=None)
    policy, optim = Tabular(CPU), OptimConfig(lr=lr, warmup=0.0, max_grad_norm=1e9)
    made = make_dataset(load_data(data)[0], data, policy.tokenise, "pairs", objective.columns, False, 0).rows
    if swap:
        made = [replace(row, tokens=replace(row.tokens, branches=row.tokens.branches[::-1])) for row in made]
    with fresh_accelerator() as accelerator:
        source = OfflineSource(made, "pairs", len(made), 10**6, 0, "label" in objective.columns, 0)
        teacher = Teacher(objective, *map(table, teachers)) if teachers else None
        engine = Engine(policy, objective, make_reference(policy, "initial"), optim, accelerator, teacher=teacher)
        whole = source.step(0)
        for step in range(steps):
            engine.step(whole, lr * (1 - step / steps))
    return policy.logits.detach().clone()


def table(logits: torch.Tensor) -> Tabular:
    made = Tabular(CPU)
    with torch.no_grad():
        made.logits.copy_(logits)
    return made


def mean_reward(logits: torch.Tensor) -> float:
    return float((logits.double().softmax(-1) * torch.tensor(bandit.reward_table(), dtype=torch.float64)).sum(-1).mean())


@pytest.fixture(scope="module")
def teachers():
    return trained("dpo", beta=0.5), trained("dpo", beta=0.5, swap=True)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_true_reward_rises_on_the_bandit(teachers, slug):
    reference = torch.tensor(bandit.reference_table())
    assert mean_reward(teachers[0]) > mean_reward(reference) + 0.05 > mean_reward(teachers[1]) + 0.1
    given = {"tdpo": 0, "tdpo1": 0, "align_distil": 2}.get(slug, 1)
    assert mean_reward(trained(slug, *teachers[:given])) > mean_reward(reference) + 0.05


def test_a_shuffled_guide_helps_nobody(teachers):
    """After the same steps TGDPO is ahead of DPO (alpha 0) with the aligned guide, and behind it with that one's table in disorder."""
    guide, settings = teachers[0], {"steps": 40, "beta": 0.5}
    order = torch.randperm(guide.numel(), generator=torch.Generator().manual_seed(0))
    guided, plain, shuffled = (mean_reward(trained("tgdpo", by, alpha=alpha, **settings))
                               for by, alpha in ((guide, 1.0), (guide, 0.0), (guide.flatten()[order].view_as(guide), 1.0)))
    assert guided > plain + 0.005 and plain > shuffled + 0.1


def test_align_distil_reaches_its_teacher(teachers):
    """A reply is one token, so its state is its prompt: the table becomes softmax(z + w (z - z')), which beats the DPO model."""
    first, second = (t.double() for t in teachers)
    found = trained("align_distil", *teachers, steps=600, beta2=1.0)
    strength = (first.softmax(-1) - second.softmax(-1)).abs().sum(-1, keepdim=True) + 1e-3
    want = (first + strength * (first - second)).softmax(-1)
    assert float((found.double().softmax(-1) - want).abs().sum(-1).max()) < 0.02
    assert mean_reward(found) > mean_reward(first) + 0.02
