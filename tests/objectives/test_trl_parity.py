"""Loss and gradients of every parameter equal TRL's, on TRL's own batches; where the two differ on purpose, the difference is shown.

TRL tokenises, collates and computes its loss with the model it was given. We take the token ids out of its batch, run a copy of the
model on each sequence alone (no padding), take float32 log-softmax, and call our objective.
"""

import copy
import importlib
import math

import pytest
import torch

trl = pytest.importorskip("trl")

import datasets  # noqa: E402
from samples import scored  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from prefopt.objectives.base import Batch, Demonstrations, Groups, Pairs, Unary, reduce_terms, total_weights  # noqa: E402
from prefopt.objectives.links import (  # noqa: E402
    EXO,
    NCA,
    APODown,
    APOZero,
    DiscoPOP,
    FDivergenceDPO,
    Hinge,
    RobustDPO,
    SPPOHard,
)
from prefopt.objectives.mixture import Mixture  # noqa: E402
from prefopt.objectives.pairwise import DPO, IPO  # noqa: E402
from prefopt.objectives.pointwise import AOT, BCO  # noqa: E402
from prefopt.objectives.policy_gradient import GRPO  # noqa: E402
from prefopt.objectives.reference_free import CPO, ORPO, SimPO, SLiC  # noqa: E402
from prefopt.objectives.regularised import AlphaPO, RegularizedPO  # noqa: E402
from prefopt.objectives.reweighted import WPO  # noqa: E402
from prefopt.objectives.token_weighted import LDDPO  # noqa: E402
from prefopt.objectives.unary import KTO, SFT  # noqa: E402

WORDS = "red green blue one two three four cat dog bird sees hears likes the a".split()
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
PREFERENCES = [  # replies of unequal length; prompts of one word and of several
    {"prompt": "the cat", "chosen": " sees a red bird", "rejected": " hears two"},
    {"prompt": "one", "chosen": " likes blue", "rejected": " likes the green dog a four"},
    {"prompt": "a dog hears the", "chosen": " three bird", "rejected": " cat"},
]
ONE_WORD_PROMPTS = [  # and chosen replies of one length
    {"prompt": "cat", "chosen": " sees a red", "rejected": " hears two"},
    {"prompt": "one", "chosen": " likes blue bird", "rejected": " likes the green dog a four"},
    {"prompt": "dog", "chosen": " three bird sees", "rejected": " cat"},
]
LABELLED = [
    {"prompt": "the cat", "completion": " sees a red bird", "label": True},
    {"prompt": "one", "completion": " likes the green dog", "label": False},
    {"prompt": "a dog hears the", "completion": " three bird", "label": True},
    {"prompt": "two dog", "completion": " hears", "label": False},
    {"prompt": "blue", "completion": " dog likes a cat one", "label": True},
    {"prompt": "bird the", "completion": " four four", "label": False},
]


def tokenizer():
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def llama(seed):
    """A random Llama without dropout, wide enough in its weights that no log-prob is near uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        attention_dropout=0.0, tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()


def trainer(tmp_path, name, rows, module="trl", ref_model=None, size=None, **options):
    """A TRL trainer on `rows`, on the CPU in float32, and our own copy of its model."""
    library = importlib.import_module(module)
    model = llama(0)
    ours = copy.deepcopy(model)
    args = getattr(library, f"{name}Config")(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, max_length=64,
        per_device_train_batch_size=size or len(rows), save_strategy="no", disable_tqdm=True, **options,
    )
    extra = {"ref_model": ref_model} if ref_model is not None else {}
    made = getattr(library, f"{name}Trainer")(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(), **extra
    )
    return made, ours


def collated(made, rows=slice(None)):
    """TRL's batch of the rows, in their order (the trainer's own loader would shuffle them)."""
    return made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))[rows]]))


def run(made, inputs):
    """TRL's loss on `inputs` and the gradient of every parameter."""
    made.model.zero_grad()
    made.model.train()
    loss = made.compute_loss(made.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.model.named_parameters()}


def sequences(ids, attention, completion):
    """[(ids without padding, their completion mask)]"""
    keep = attention.bool()
    return [(row[k], mask[k].bool()) for row, k, mask in zip(ids, keep, completion, strict=True)]


def paired(inputs):
    """Sequences of a CPO or ORPO batch: all chosen, then all rejected."""
    return [s for side in ("chosen", "rejected") for s in sequences(
        inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"], inputs[f"{side}_labels"] != -100)]


def token_logps(model, edges):
    """Log-probs of the trained tokens of each sequence, run alone: plain float32 log-softmax."""
    out = []
    for ids, trained in edges:
        logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        out.append(logps[:-1].gather(1, ids[1:, None])[:, 0][trained[1:]])
    return out


def ours_on(objective, model, edges, reference=None, **views):
    """Our loss on the sequences and the gradient of every parameter."""
    model.zero_grad()
    model.train()
    policy = token_logps(model, edges)
    lengths = torch.tensor([len(p) for p in policy])
    layout = Batch(lengths, torch.repeat_interleave(torch.arange(len(edges)), lengths), {}, **views)
    tokens = {"policy": torch.cat(policy)}
    if "reference" in objective.quantities:
        with torch.no_grad():
            tokens["reference"] = torch.cat(token_logps(reference, edges))
    batch = scored(objective, layout, tokens)
    loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, layout))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def pairs(count):
    """All chosen sequences first, then all rejected, as TRL lays them out."""
    one = torch.ones(count)
    return {"pairs": Pairs(torch.arange(count), torch.arange(count) + count, one, one, 0 * one)}


def assert_same(theirs, ours):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    assert theirs[1].keys() == ours[1].keys() and any(g.abs().max() > 1e-3 for g in theirs[1].values())
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def dpo_edges(inputs):
    return sequences(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo(tmp_path, beta):
    reference = llama(1)
    made, model = trainer(tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=beta, loss_type="sigmoid")
    inputs = collated(made)
    assert_same(run(made, inputs), ours_on(DPO(beta=beta), model, dpo_edges(inputs), reference, **pairs(3)))


def test_dpo_label_smoothing(tmp_path):
    """TRL's `sigmoid` does not read label_smoothing. Its `robust` loss R and sigmoid loss S give ours: 2 (1-e) S - (1-2e) R."""
    e, reference = 0.2, llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.5, label_smoothing=e,
        loss_type=["sigmoid", "robust"], loss_weights=[2 * (1 - e), -(1 - 2 * e)],
    )
    inputs = collated(made)
    theirs = run(made, inputs)
    assert_same(theirs, ours_on(DPO(beta=0.5, label_smoothing=e), model, dpo_edges(inputs), reference, **pairs(3)))
    made.loss_types, made.loss_weights = ["sigmoid"], [1.0]
    assert_same(run(made, inputs), ours_on(DPO(beta=0.5), model, dpo_edges(inputs), reference, **pairs(3)))


def test_ipo_is_trl_with_length_normalize(tmp_path):
    reference = llama(1)
    made, model = trainer(tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.3, loss_type="ipo")
    inputs = collated(made)
    theirs, edges = run(made, inputs), dpo_edges(inputs)
    assert_same(theirs, ours_on(IPO(tau=0.3, length_normalize=True), model, edges, reference, **pairs(3)))
    summed = ours_on(IPO(tau=0.3, length_normalize=False), model, edges, reference, **pairs(3))
    assert abs(summed[0] - theirs[0]) > 0.1, "the paper's token sums are another loss"


LINKS = {  # TRL's name of the loss: its options, ours
    "robust": ({"label_smoothing": 0.2}, RobustDPO(beta=0.4, eps=0.2)),
    "hinge": ({}, Hinge(beta=0.4)),
    "exo_pair": ({"label_smoothing": 0.05}, EXO(beta=0.4, eps=0.05)),
    "nca_pair": ({}, NCA(beta=0.4)),
    "apo_zero": ({}, APOZero(beta=0.4)),
    "apo_down": ({}, APODown(beta=0.4)),
    "discopop": ({"discopop_tau": 0.3}, DiscoPOP(beta=0.4, tau=0.3)),
}


@pytest.mark.parametrize("loss_type", LINKS)
def test_links(tmp_path, loss_type):
    options, objective = LINKS[loss_type]
    reference = llama(1)
    made, model = trainer(tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.4, loss_type=loss_type, **options)
    inputs = collated(made)
    assert_same(run(made, inputs), ours_on(objective, model, dpo_edges(inputs), reference, **pairs(3)))


def test_sppo_hard_is_trl_halved(tmp_path):
    """The paper and its authors' code take the mean over a pair's replies, TRL the sum; TRL's beta is 1 / eta."""
    reference = llama(1)
    made, model = trainer(tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.4, loss_type="sppo_hard")
    inputs = collated(made)
    theirs, ours = run(made, inputs), ours_on(SPPOHard(eta=2.5), model, dpo_edges(inputs), reference, **pairs(3))
    # Both are taken down by 10: their gradients are sums of tens, and the tolerance is for sums of ones.
    assert_same(*((scale * loss, {name: scale * g for name, g in grads.items()}) for scale, (loss, grads) in ((0.1, theirs), (0.2, ours))))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergences(tmp_path, divergence):
    """TRL's coefficient of the alpha divergence is 1 - alpha."""
    reference = llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.05, loss_type="sigmoid", f_divergence_type=divergence,
        f_alpha_divergence_coef=0.7,
    )
    inputs = collated(made)
    objective = FDivergenceDPO(beta=0.05, divergence=divergence, alpha=0.3)
    assert_same(run(made, inputs), ours_on(objective, model, dpo_edges(inputs), reference, **pairs(3)))


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


def test_regularised_dpo_is_trl_with_token_mean_and_without_beta(tmp_path):
    reference = llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]
    )
    inputs = collated(made)
    theirs, edges = run(made, inputs), dpo_edges(inputs)
    same = RegularizedPO(beta=0.3, eta=0.2, reduction="token_mean", times_beta=False)
    assert_same(theirs, ours_on(same, model, edges, reference, **pairs(3)))
    for other in (RegularizedPO(beta=0.3, eta=0.2, reduction="mean", times_beta=False), RegularizedPO(beta=0.3, eta=0.2)):
        assert abs(ours_on(other, model, edges, reference, **pairs(3))[0] - theirs[0]) > 1e-3, "the paper's forms are other losses"


def test_wpo_is_trl_without_its_alignment(tmp_path):
    """TRL divides each token's probability by the policy's sum of squared probabilities; on one pair that is a constant factor."""
    reference = llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES[:1], ref_model=copy.deepcopy(reference), beta=0.3, loss_type="sigmoid", use_weighting=True
    )
    inputs = collated(made)
    theirs, edges, spread = run(made, inputs), dpo_edges(inputs), 0.0
    with torch.no_grad():
        for ids, trained in edges:
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            spread += torch.logsumexp(2 * logps[:-1], -1)[trained[1:]].mean().item()
    loss, grads = ours_on(WPO(beta=0.3), model, edges, reference, **pairs(1))
    factor = math.exp(-spread)
    assert factor > 2
    assert_same(theirs, (factor * loss, {name: factor * g for name, g in grads.items()}))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(tmp_path, alpha):
    """Of these pairs the chosen reply is the longer one, the rejected one, and the chosen one again."""
    reference = llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.3, loss_type="sigmoid", ld_alpha=alpha
    )
    inputs = collated(made)
    theirs, edges = run(made, inputs), dpo_edges(inputs)
    assert_same(theirs, ours_on(LDDPO(beta=0.3, alpha=alpha), model, edges, reference, **pairs(3)))
    if alpha < 1:
        assert abs(ours_on(DPO(beta=0.3), model, edges, reference, **pairs(3))[0] - theirs[0]) > 1e-2


@pytest.mark.parametrize("paired", [True, False])
def test_aot(tmp_path, paired):
    """On a step of one micro-batch, since TRL sorts within each. Sorting matters here: DPO is another loss."""
    reference = llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.3, loss_type="aot" if paired else "aot_unpaired"
    )
    inputs = collated(made)
    theirs, edges = run(made, inputs), dpo_edges(inputs)
    assert_same(theirs, ours_on(AOT(beta=0.3, paired=paired), model, edges, reference, **pairs(3)))
    assert abs(ours_on(DPO(beta=0.3), model, edges, reference, **pairs(3))[0] - theirs[0]) > 1e-3


def test_bco_pair_of_trl_has_no_midpoint(tmp_path):
    """It is the sum over the two replies of a pair, so twice a mean over replies, at delta = 0; ours is that at the classes' midpoint."""
    reference = llama(7)
    made, model = trainer(tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.3, loss_type="bco_pair")
    inputs = collated(made)
    theirs, edges = run(made, inputs)[0], dpo_edges(inputs)
    view = {"unary": Unary(torch.arange(6), torch.arange(6) < 3, torch.ones(6), torch.arange(0))}
    ours = 2 * ours_on(BCO(beta=0.3), model, edges, reference, **view)[0]
    with torch.no_grad():
        policy, told = ([float(t.sum()) for t in token_logps(m, edges)] for m in (model, reference))
    ratio = [a - b for a, b in zip(policy, told, strict=True)]

    def twice_the_mean(delta):
        return sum(math.log1p(math.exp(-0.3 * (r - delta if i < 3 else delta - r))) for i, r in enumerate(ratio)) / 3

    assert abs(theirs - ours) > 1e-3
    assert theirs == pytest.approx(twice_the_mean(0.0), abs=1e-5) and ours == pytest.approx(twice_the_mean(sum(ratio) / 6), abs=1e-5)


@pytest.mark.parametrize(("losses", "parts"), [
    ({"sigmoid": 0.8, "sft": 1.0}, [("pairwise.DPO", 0.8, {"beta": 0.3}), ("unary.SFT", 1.0, {})]),
    ({"hinge": 0.3, "sigmoid": 0.5, "sft": 0.1}, [("links.Hinge", 0.3, {"beta": 0.3}), ("pairwise.DPO", 0.5, {"beta": 0.3}),
                                                 ("unary.SFT", 0.1, {})]),
])
def test_mixture_is_trl_with_several_losses(tmp_path, losses, parts):
    reference = llama(1)
    made, model = trainer(
        tmp_path, "DPO", PREFERENCES, ref_model=copy.deepcopy(reference), beta=0.3, loss_type=list(losses), loss_weights=[*losses.values()]
    )
    inputs = collated(made)
    mixture = Mixture([{"_target_": f"prefopt.objectives.{name}", "weight": weight, **settings} for name, weight, settings in parts])
    assert_same(run(made, inputs), ours_on(mixture, model, dpo_edges(inputs), reference, **pairs(3)))
