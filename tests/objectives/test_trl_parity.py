"""Loss and gradients of every parameter equal those of TRL's DPO trainer with its many losses, on TRL's own batches (`trl_runs.py`);
where the two differ on purpose, the difference is shown."""

import copy
import math

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import PREFERENCES, assert_same, collated, dpo_edges, llama, ours_on, pairs, run, token_logps, trainer  # noqa: E402

from prefopt.objectives.base import Unary  # noqa: E402
from prefopt.objectives.links import EXO, NCA, APODown, APOZero, DiscoPOP, FDivergenceDPO, Hinge, RobustDPO, SPPOHard  # noqa: E402
from prefopt.objectives.mixture import Mixture  # noqa: E402
from prefopt.objectives.pairwise import DPO, IPO  # noqa: E402
from prefopt.objectives.pointwise import AOT, BCO  # noqa: E402
from prefopt.objectives.regularised import RegularizedPO  # noqa: E402
from prefopt.objectives.reweighted import WPO  # noqa: E402
from prefopt.objectives.token_weighted import LDDPO  # noqa: E402


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
