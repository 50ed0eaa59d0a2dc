"""Loss and gradients of every parameter equal those of TRL's other trainers (CPO, ORPO, KTO, SFT, GRPO), on their own batches
(`trl_runs.py`); where the two differ on purpose, the difference is shown."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl")

import datasets  # noqa: E402
from samples import scored  # noqa: E402
from trl_runs import (  # noqa: E402
    LABELLED,
    ONE_WORD_PROMPTS,
    PREFERENCES,
    assert_same,
    collated,
    llama,
    ours_on,
    paired,
    pairs,
    run,
    sequences,
    token_logps,
    tokenizer,
    trainer,
)

from prefopt.objectives.base import Batch, Demonstrations, Groups, Unary, reduce_terms, total_weights  # noqa: E402
from prefopt.objectives.policy_gradient import GRPO  # noqa: E402
from prefopt.objectives.reference_free import CPO, ORPO, SimPO, SLiC  # noqa: E402
from prefopt.objectives.regularised import AlphaPO  # noqa: E402
from prefopt.objectives.unary import KTO, SFT  # noqa: E402


def cpo(tmp_path, rows=PREFERENCES, **options):
    made, model = trainer(tmp_path, "CPO", rows, module="trl.experimental.cpo", **options)
    inputs = collated(made)
    return run(made, inputs), model, paired(inputs)


def test_cpo_is_trl_with_nll_token_mean(tmp_path):
    theirs, model, edges = cpo(tmp_path, beta=0.3, cpo_alpha=0.5, loss_type="sigmoid")
    assert_same(theirs, ours_on(CPO(beta=0.3, alpha=0.5, nll_token_mean=True), model, edges, **pairs(3)))
    summed = ours_on(CPO(beta=0.3, alpha=0.5, nll_token_mean=False), model, edges, **pairs(3))
    assert abs(summed[0] - theirs[0]) > 0.1, "the paper's sum over tokens is another loss"


def test_cpo_without_likelihood_term(tmp_path):
    theirs, model, edges = cpo(tmp_path, beta=0.3, cpo_alpha=0.0, loss_type="sigmoid")
    assert_same(theirs, ours_on(CPO(beta=0.3, alpha=0.0), model, edges, **pairs(3)))


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_simpo(tmp_path, smoothing):
    theirs, model, edges = cpo(tmp_path, beta=2.0, simpo_gamma=0.8, cpo_alpha=0.0, loss_type="simpo", label_smoothing=smoothing)
    assert_same(theirs, ours_on(SimPO(beta=2.0, gamma=0.8, label_smoothing=smoothing), model, edges, **pairs(3)))


def test_slic_is_trl_hinge_scaled(tmp_path):
    """TRL's hinge is max(0, 1 - beta (w - l)): ours times beta at delta = 1 / beta."""
    beta = 0.05
    theirs, model, edges = cpo(tmp_path, beta=beta, cpo_alpha=0.0, loss_type="hinge")
    loss, grads = ours_on(SLiC(delta=1 / beta, lambda_=0.0), model, edges, **pairs(3))
    assert_same(theirs, (beta * loss, {name: beta * g for name, g in grads.items()}))


def test_slic_regulariser_is_a_sum_where_trl_has_a_token_mean(tmp_path):
    """On a single pair the two differ by the number of chosen tokens."""
    beta, alpha = 0.05, 0.4
    theirs, model, edges = cpo(tmp_path, rows=PREFERENCES[:1], beta=beta, cpo_alpha=alpha, loss_type="hinge")
    tokens = int(edges[0][1].sum())
    assert tokens == 5
    loss, grads = ours_on(SLiC(delta=1 / beta, lambda_=alpha / (beta * tokens)), model, edges, **pairs(1))
    assert_same(theirs, (beta * loss, {name: beta * g for name, g in grads.items()}))


def orpo(tmp_path, rows, lambda_):
    made, model = trainer(tmp_path, "ORPO", rows, module="trl.experimental.orpo", beta=lambda_)
    inputs = collated(made)
    return run(made, inputs), model, paired(inputs)


def test_orpo(tmp_path):
    """One-word prompts and chosen replies of one length: then TRL's mean over the batch's tokens is the paper's mean per reply."""
    theirs, model, edges = orpo(tmp_path, ONE_WORD_PROMPTS, 0.4)
    assert_same(theirs, ours_on(ORPO(lambda_=0.4), model, edges, **pairs(3)))


def test_orpo_likelihood_term_of_trl_reads_prompts(tmp_path):
    """On other rows TRL's likelihood term is a mean over all tokens of the chosen sequences, prompts included; the rest is ours."""
    theirs, model, edges = orpo(tmp_path, PREFERENCES, 0.4)
    loss, _ = ours_on(ORPO(lambda_=0.4), model, edges, **pairs(3))
    with torch.no_grad():
        replies = token_logps(model, edges[:3])
        everything = torch.cat(token_logps(model, [(ids, torch.ones_like(trained)) for ids, trained in edges[:3]]))
    paper = -sum(r.mean() for r in replies).item() / 3
    assert abs(theirs[0] - loss) > 0.01
    assert theirs[0] - loss == pytest.approx(-everything.mean().item() - paper, abs=1e-5)


def kto(tmp_path, reference, size=None, **options):
    return trainer(tmp_path, "KTO", LABELLED, ref_model=copy.deepcopy(reference), beta=0.3, size=size, **options)


def kto_edges(inputs):
    """Sequences of a KTO batch: the replies, then TRL's mismatched ones; and the view of them."""
    own = sequences(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    swapped = sequences(inputs["KL_input_ids"], inputs["KL_attention_mask"], inputs["KL_completion_mask"])
    count = len(own)
    view = Unary(torch.arange(count), inputs["label"].bool(), torch.ones(count), torch.arange(count) + count)
    return own + swapped, {"unary": view}


def kl_drift(model, reference, edges):
    """Sum over sequences of log pi - log pi_ref."""
    with torch.no_grad():
        both = zip(token_logps(model, edges), token_logps(reference, edges), strict=True)
        return sum((p.sum() - r.sum()).item() for p, r in both)


@pytest.mark.parametrize(("seed", "positive"), [(1, True), (7, False)])
def test_kto(tmp_path, seed, positive):
    """On the same mismatched replies, with a KL estimate above 0 and with one that is clamped."""
    reference = llama(seed)
    made, model = kto(tmp_path, reference, desirable_weight=1.3, undesirable_weight=0.8)
    inputs = collated(made)
    edges, view = kto_edges(inputs)
    drift = kl_drift(model, reference, edges[6:])
    assert abs(drift) > 0.5 and (drift > 0) == positive
    assert_same(run(made, inputs), ours_on(KTO(beta=0.3, lambda_D=1.3, lambda_U=0.8), model, edges, reference, **view))


def test_kto_kl_estimate_of_trl_depends_on_the_micro_batch(tmp_path):
    """TRL pairs a prompt with the reply before it in the same micro-batch and averages there; ours is one estimate per global batch."""
    reference = llama(1)
    made, model = kto(tmp_path, reference, size=3)
    ids = [list(row) for row in made.train_dataset["completion_ids"]]
    assert [list(row) for row in made.train_dataset["KL_completion_ids"]] == [ids[2], ids[0], ids[1], ids[5], ids[3], ids[4]]
    halves = [collated(made, slice(0, 3)), collated(made, slice(3, 6))]
    mean_of_halves = sum(run(made, inputs)[0] for inputs in halves) / 2
    whole = collated(made)
    edges, view = kto_edges(whole)
    drifts = [kl_drift(model, reference, edges[start : start + 3]) for start in (6, 9)]
    assert drifts[0] > 0 or drifts[1] > 0
    global_loss = ours_on(KTO(beta=0.3), model, edges, reference, **view)
    assert_same(run(made, whole), global_loss)
    assert abs(mean_of_halves - global_loss[0]) > 1e-3


def test_sft(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES]
    made, model = trainer(tmp_path, "SFT", rows, completion_only_loss=True)
    inputs = collated(made)
    edges = sequences(inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100)
    view = {"demonstrations": Demonstrations(torch.arange(3), torch.ones(3))}
    assert [int(trained.sum()) for _, trained in edges] == [5, 3, 3], "the replies and their ends are trained, the prompts are not"
    assert_same(run(made, inputs), ours_on(SFT(), model, edges, **view))


@pytest.mark.parametrize(("beta", "scaled", "unbiased"), [(0.0, True, False), (0.1, True, False), (0.1, False, False), (0.1, True, True)])
def test_grpo(tmp_path, beta, scaled, unbiased):
    """On replies that an older policy wrote; rewards go in on our side, the advantages made of them in TRL's words on theirs."""
    policy, ours, older, reference = llama(0), llama(0), llama(3), llama(4)
    made = trl.GRPOTrainer(
        model=policy, reward_funcs=lambda completions, **_: [0.0] * len(completions), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "the cat"}, {"prompt": "one"}]),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
            save_strategy="no", per_device_train_batch_size=6, num_generations=3, max_completion_length=8, beta=0.0, loss_type="grpo",
            temperature=1.0, use_bias_correction_kl=unbiased, disable_tqdm=True,
        ),
    )
    made.current_gradient_accumulation_steps = 1
    made.beta = beta  # set here because it would load a reference from a hub id; the reference's scores are in the inputs
    prompts, replies = [[3, 10], [6]], [[11, 12, 1], [13, 1], [14, 15, 4, 5, 1], [16, 1], [17, 3, 4, 1], [5, 6, 7]]
    begun = [prompts[i // 3] for i in range(6)]
    edges = [(torch.tensor(p + r), torch.tensor([False] * len(p) + [True] * len(r))) for p, r in zip(begun, replies, strict=True)]
    rewards = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, 2.0])
    grouped = rewards.view(2, 3)
    centred = grouped - grouped.mean(1, keepdim=True)
    advantages = (centred / (grouped.std(1, keepdim=True) + 1e-4) if scaled else centred).flatten()
    with torch.no_grad():
        old, ref = token_logps(older, edges), token_logps(reference, edges)

    def padded(rows, side):
        width = max(map(len, rows))
        missing = [width - len(r) for r in rows]
        return torch.stack([torch.nn.functional.pad(r, (m, 0) if side == "left" else (0, m)) for r, m in zip(rows, missing, strict=True)])

    left = [ids[~trained] for ids, trained in edges]
    right = [ids[trained] for ids, trained in edges]
    inputs = {
        "prompt_ids": padded(left, "left"), "prompt_mask": padded([torch.ones_like(r) for r in left], "left"),
        "completion_ids": padded(right, "right"), "completion_mask": padded([torch.ones_like(r) for r in right], "right"),
        "advantages": advantages, "old_per_token_logps": padded(old, "right"), "ref_per_token_logps": padded(ref, "right"),
    }
    made.model.zero_grad()
    made.model.train()
    theirs = made._compute_loss(made.model, inputs)
    theirs.backward()
    policy = token_logps(ours, edges)
    lengths = torch.tensor([len(p) for p in policy])
    groups = Groups(torch.arange(6), torch.tensor([0, 0, 0, 3, 3, 3]), rewards, torch.ones(6))
    layout = Batch(lengths, torch.repeat_interleave(torch.arange(6), lengths), {}, groups=groups)
    objective = GRPO(beta=beta, epsilon=0.2, scale_rewards=scaled, unbiased_kl=unbiased)
    batch = scored(objective, layout, {"policy": torch.cat(policy), "previous": torch.cat(old), "reference": torch.cat(ref)})
    loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, layout))
    loss.backward()
    results = [(x.item(), {n: p.grad for n, p in model.named_parameters()}) for x, model in ((theirs, made.model), (loss, ours))]
    assert_same(*results)


@pytest.mark.parametrize("alpha", [0.25, -0.5, 0.0])
def test_alphapo(tmp_path, alpha):
    theirs, model, edges = cpo(tmp_path, beta=2.5, simpo_gamma=0.3, alpha=alpha, loss_type="alphapo")
    assert_same(theirs, ours_on(AlphaPO(beta=2.5, gamma=0.3, alpha=alpha), model, edges, **pairs(3)))
