"""PPD: a diffusion model that is told for whom it draws. What is trained, what is not, and what a user does to a score."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prefopt.cli import main
from prefopt.config.schema import ModelConfig, NoiseConfig
from prefopt.data.batch import Row
from prefopt.data.records import BadRow, Message, parse_row
from prefopt.data.sources import Split
from prefopt.data.tokenise import Tokens
from prefopt.data.users import embedding, read_users
from prefopt.errors import UserError
from prefopt.evaluation.label import Counts, labelled
from prefopt.objectives.pairwise import DPO
from prefopt.policies.denoiser_flops import caption_shapes
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.noise import HELD_OUT, Draws, address
from prefopt.policies.pipeline_folder import open_folder
from prefopt.policies.reference import AdapterOff, FrozenCopy, make_reference
from prefopt.policies.start import started
from prefopt.policies.user_branch import NAME, UserAttention
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from prefopt.training.plan_pictures import dry_run
from tests import toy_denoising as toy
from tests.tiny_pipelines import save
from tests.toy_runs import fresh_accelerator, gradients, train
from tests.unit.test_diffusion_policy import D, engine_of, logits, moved
from tests.unit.test_moving_reference import weights

COLUMNS = {name: name for name in ("prompt", "chosen", "rejected", "user", "messages")}
ANN, BOB = [1.0, 0.0], [0.0, 1.0]
LONG = [[1.0, 0.5], [0.25, -1.0], [0.0, 2.0]]  # three tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save(family, root / family)
        return made[family]

    return get


def prompt(user=None) -> list[Message]:
    example = parse_row({"prompt": "a", "user": user}, COLUMNS)
    return example.prompt


def policy_of(folder, noise=None, trained: bool = True, **settings):
    """Told users of two numbers; with something in W_v to be seen."""
    policy = toy.policy(folder, noise, user_width=2, **settings)
    if trained:
        moved(policy, 0.3)
    return policy


def rows_for(policy, *users, count: int = 2, held_out: bool = False) -> list[Row]:
    """The pairs of `toy.rows`, each once for each of the users."""
    out = []
    for row in toy.rows(policy, count, held_out):
        for said in users:
            user = None if said is None else policy.users.of(prompt(said))
            branches = []
            for branch in row.tokens.branches:
                picture, caption, *rest = branch.ids
                branches.append(type(branch)([picture, policy.users.told(caption, user), *rest], branch.mask, True))
            (caption,) = row.tokens.prompt
            out.append(Row(Tokens([policy.users.told(caption, user)], branches, frame=row.tokens.frame), "pair"))
    return out


# ---- the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "pixart"])
def test_a_fresh_branch_changes_nothing_and_a_trained_one_can_be_switched_off(folders, family):
    """The same numbers to the last bit, for any user; and the weights of the network are those of the folder."""
    plain, told = open_denoiser(folders(family)), open_denoiser(folders(family), user_width=3)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([40, 700])
    cond = {name: torch.randn(2, *shape, generator=generator) for name, shape in caption_shapes(plain).items()}
    if "mask" in cond:
        cond["mask"] = torch.arange(cond["mask"].shape[1]).expand(2, -1).lt(torch.tensor([[5], [9]])).long()
    users = {"user": torch.randn(2, 4, 3, generator=generator), "user_mask": (torch.arange(4) < torch.tensor([[4], [2]]))[:, None, None]}
    trained = {name: p for name, p in told.network.named_parameters() if p.requires_grad}
    layers = [m for m in told.network.modules() if isinstance(m, UserAttention)]
    assert len(trained) == 2 * len(layers) > 0 and all(".attn2.processor.to_" in name for name in trained)
    with torch.no_grad():
        wanted = plain.predict(x, t, cond)
        assert torch.equal(told.predict(x, t, cond | users), wanted)
        for parameter in trained.values():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        assert not torch.allclose(told.predict(x, t, cond | users), wanted, atol=1e-3)
        assert torch.equal(told.predict(x, t, cond | {"user": torch.zeros(2, 1, 3)}), wanted), "u = 0 is the base"
        with told.without_adapter():
            assert torch.equal(told.predict(x, t, cond | users), wanted)
        alone = told.predict(x[1:], t[1:], {n: v[1:] for n, v in cond.items()} | {"user": users["user"][1:, :2]})
        torch.testing.assert_close(alone, told.predict(x, t, cond | users)[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_the_branch_is_an_attention_of_its_own_beside_that_to_the_caption(folders, family):
    """Against softmax(Q K^T / sqrt d) V written out, head by head."""
    network = open_denoiser(folders(family), user_width=3).network
    attention = next(m for m in network.modules() if isinstance(getattr(m, "processor", None), UserAttention))
    branch, generator = attention.processor, torch.Generator().manual_seed(1)
    torch.nn.init.normal_(branch.to_v.weight, generator=generator)
    x = torch.randn(2, 6, attention.to_q.in_features, generator=generator)
    text = torch.randn(2, 4, attention.to_k.in_features, generator=generator)
    user, lengths = torch.randn(2, 5, 3, generator=generator), (5, 2)
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        made = attention(x, encoder_hidden_states=text, ip_hidden_states=user, ip_adapter_masks=mask[:, None, None])
        for row, length in enumerate(lengths):
            q, heads = attention.to_q(x[row]), []
            sources = ((attention.to_k(text[row]), attention.to_v(text[row])),
                       (user[row, :length] @ branch.to_k.weight.T, user[row, :length] @ branch.to_v.weight.T))
            d = q.shape[1] // attention.heads
            for h in range(attention.heads):
                own = slice(h * d, (h + 1) * d)
                heads.append(sum(torch.softmax(q[:, own] @ k[:, own].T / d**0.5, 1) @ v[:, own] for k, v in sources))
            wanted = torch.cat(heads, 1) @ attention.to_out[0].weight.T + attention.to_out[0].bias
            torch.testing.assert_close(made[row], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_a_network_without_such_attentions_is_refused(folders, family):
    with pytest.raises(UserError, match=r"model.user_width=3: .* has no cross-attention .*; adapter=user is for SD 1.x and 2.x, SDXL"):
        open_denoiser(folders(family), user_width=3)


def test_what_is_saved_is_small_and_comes_back(folders, tmp_path):
    policy, other = policy_of(folders("sd15")), policy_of(folders("sd15"), trained=False)
    policy.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME] and len(load_file(tmp_path / NAME)) == len(policy.trainable())
    other.denoiser.restore(tmp_path)
    assert all(torch.equal(p, policy.trainable()[name]) for name, p in other.trainable().items())
    with pytest.raises(UserError, match=r"user_width=3 makes it .*; set model.user_width=2"):
        open_denoiser(folders("sd15"), user_width=3).restore(tmp_path)
    with pytest.raises(UserError, match="belongs to another network"):
        open_denoiser(folders("sdxl"), user_width=2).restore(tmp_path)
    with pytest.raises(UserError, match="holds no user_branch.safetensors"):
        other.denoiser.restore(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model=toy is told none; add adapter=user"):
        started(ModelConfig(name="toy", kind="diffusion", start=str(tmp_path)))


def test_a_plan_knows_what_is_trained(folders):
    cfg = SimpleNamespace(model=ModelConfig(name="toy", kind="diffusion", resolution=16, user_width=2),
                          hardware=SimpleNamespace(precision="bf16"))
    planned, unknown = dry_run(open_folder(folders("sd15")), cfg, 2)
    own = sum(p.numel() for p in policy_of(folders("sd15")).trainable().values())
    assert not unknown and planned.trainable == own < planned.parameters and planned.activations > 0


# ---- scores and gradients -------------------------------------------------------------------------------


def test_before_training_the_loss_is_log_2_for_any_user(folders):
    policy = policy_of(folders("sd15"), trained=False)
    reference = make_reference(policy, "initial")
    assert isinstance(reference, AdapterOff)
    assert logits(policy, reference, rows_for(policy, ANN, BOB, LONG)).abs().max() == 0
    with fresh_accelerator() as accelerator:
        seen, loss = gradients(engine_of(policy, accelerator, reference=reference), toy.source(policy, rows_for(policy, ANN, LONG)).step(0))
    assert loss == pytest.approx(0.6931472, abs=1e-6)
    assert all(g.abs().max() > 1e-4 for name, g in seen.items() if "to_v" in name), "and a user has a gradient"


@pytest.mark.parametrize("user, noise", [([0.0, 0.0], {}), (ANN, {"user_dropout": 0.999999})], ids=["zero", "dropped"])
def test_nobody_has_no_gradient(folders, user, noise):
    policy = policy_of(folders("sd15"), noise)
    micros = toy.source(policy, rows_for(policy, user)).step(0)
    with fresh_accelerator() as accelerator:
        seen, loss = gradients(engine_of(policy, accelerator, reference=AdapterOff(policy)), micros)
    assert loss == pytest.approx(0.6931472, abs=1e-6)
    assert seen and all(float(g.abs().max()) == 0 for g in seen.values())


def test_all_users_are_scored_at_the_same_draws_and_the_reference_knows_none(folders):
    policy = policy_of(folders("sd15"), {"draws": 2})
    ann, bob = ([row] for row in rows_for(policy, ANN, BOB, count=1))
    sites = [policy.sites(toy.micro(policy, rows)) for rows in (ann, bob)]
    assert torch.equal(sites[0].x_t, sites[1].x_t) and torch.equal(sites[0].t, sites[1].t) and sites[0].captions != sites[1].captions
    own, base = ([model(toy.micro(policy, rows))["token_logp"] for rows in (ann, bob)] for model in (policy, AdapterOff(policy)))
    assert torch.equal(*base) and not torch.allclose(*own, atol=1e-3)
    frozen = FrozenCopy(policy)  # of a policy that starts from a trained branch
    assert torch.equal(frozen(toy.micro(policy, bob))["token_logp"], own[1])
    with fresh_accelerator() as accelerator:
        assert isinstance(make_reference(policy, "base"), AdapterOff) and engine_of(policy, accelerator).parameters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_depends_neither_on_the_split_nor_on_checkpointing(folders, checkpointing):
    """Users of one and of three tokens, and nobody, in one micro-batch or apart, on one rank or two; the reference is asked in between."""
    found = []
    for budget, world in ((10**6, 1), (1, 1), (10**6, 2)):
        parts = []
        for rank in range(world):
            policy = policy_of(folders("sd15"), {"draws": 2, "dropout": 0.3, "user_dropout": 0.3},
                               gradient_checkpointing=checkpointing and budget > 1)
            rows = rows_for(policy, ANN, LONG, None)
            parts += toy.source(policy, rows, budget, rank, world).step(1)
        with fresh_accelerator() as accelerator:
            found.append(gradients(engine_of(policy, accelerator, DPO(beta=100 / D), AdapterOff(policy)), parts))
    (whole, loss), *others = found
    largest = float(max(g.abs().max() for g in whole.values()))
    assert largest > 1e-3
    for gradient, other in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for name in whole:
            torch.testing.assert_close(gradient[name], whole[name], rtol=1e-3, atol=1e-4 * largest)


def test_captions_and_users_are_dropped_apart(folders):
    policy = policy_of(folders("sd15"), {"dropout": 0.5, "user_dropout": 0.5, "draws": 64})
    (row,) = rows_for(policy, ANN, count=1)
    (_, told, group, *numbers), draws = row.tokens.branches[0].ids, policy.draws
    caption, user = policy.users.parts(told)
    nothing = policy.encodings.caption_of("")
    said = [policy.users.parts(c) for c in policy.sites(toy.micro(policy, [row])).captions]
    assert said[:64] == said[64:], "both pictures alike"
    assert said[:64] == [(nothing if draws.dropped(group, n) else caption, None if draws.user_dropped(group, n) else user) for n in numbers]
    assert len(set(said)) == 4
    assert not any(Draws(NoiseConfig(user_dropout=0.99), 0).user_dropped(group, HELD_OUT + n) for n in range(8))


def looks(policy, number: int, good: bool) -> int:
    """The address of a picture that is light everywhere, or dark."""
    where = address("light or dark", number, good)
    noise = torch.randn(toy.SHAPE, generator=torch.Generator().manual_seed(2 * number + good))
    policy.encodings.add_latent(where, (1.0 if good else -1.0) + 0.5 * noise)
    return where


def opposed(policy, numbers, held_out: bool, users) -> list[Row]:
    """Pairs of a light and a dark picture, once for each of two users, of whom the first prefers light and the second dark."""
    out, caption = [], policy.encodings.caption_of("a")
    for number in numbers:
        pictures = [looks(policy, number, True), looks(policy, number, False)]
        group = address("group", caption, *sorted(pictures))
        for place, said in enumerate(users):
            told = policy.users.told(caption, policy.users.of(prompt(said)))
            order = pictures if place == 0 else pictures[::-1]
            draws = policy.draws.numbers(held_out)
            out.append(Row(Tokens([told], [policy.draws.branch(p, told, group, draws) for p in order], frame=toy.SHAPE), "pair"))
    return out


@pytest.mark.parametrize("blind", [False, True], ids=["told", "blind"])
def test_users_of_opposite_taste_are_told_apart(folders, blind):
    """After some steps the margin of held-out pairs changes its sign with the user. Of a model that cannot tell them apart the margins are
    the same for both, so that one of the two is wrong about each pair."""
    policy = policy_of(folders("sd15"), {"low": 0.2, "held_out": 8}, trained=False)
    reference, users = AdapterOff(policy), [ANN, ANN] if blind else [ANN, BOB]
    rows = opposed(policy, range(8), False, users)
    with fresh_accelerator() as accelerator:
        engine = engine_of(policy, accelerator, DPO(beta=300 / D), reference)
        source = toy.source(policy, rows)
        losses = [engine.step(source.step(n), lr=2e-2).loss for n in range(30)]
        judged = opposed(policy, range(100, 108), True, users)
        micro = toy.source(policy, judged).everything("pairs")
        with torch.no_grad():
            batch = [engine.score(m) for m in micro]
    margins = torch.cat([engine.objective.rewards(b)[b.pairs.chosen] - engine.objective.rewards(b)[b.pairs.rejected] for b in batch])
    accuracy = float((margins > 0).double().mean())
    if blind:
        assert min(losses) >= 0.6931 and accuracy == 0.5
    else:
        assert losses[-1] < 0.6 and accuracy == 1.0
        swapped = opposed(policy, range(100, 108), True, users[::-1])
        with torch.no_grad():
            (again,) = [engine.score(m) for m in toy.source(policy, swapped).everything("pairs")]
        h = engine.objective.rewards(again)
        assert bool((h[again.pairs.chosen] < h[again.pairs.rejected]).all()), "each is wrong under the other's taste"


# ---- rows -----------------------------------------------------------------------------------------------


def test_a_row_of_pictures_says_whose_preference_it_is():
    row = {"prompt": "a fox", "chosen": {"image": "a.png"}, "rejected": {"image": "b.png"}, "user": "ann"}
    told, untold = parse_row(row, COLUMNS), parse_row({k: v for k, v in row.items() if k != "user"}, COLUMNS)
    assert told.prompt[0].user == "ann" and untold.prompt[0].user is None
    assert told.prompt_text == untold.prompt_text == "a fox" and not told.meta
    digests = [Split("train", [e]).digest() for e in (told, untold, told.told("bob"), parse_row(row | {"user": [1.0]}, COLUMNS))]
    assert len(set(digests)) == 4 and digests[1] == Split("train", [parse_row(row | {"user": None}, COLUMNS)]).digest()
    assert labelled(told, [1.0, 0.0], False, Counts())["user"] == "ann"
    assert told.told("bob").prompt[0].user == "bob" and told.prompt[0].user == "ann"


def test_a_text_keeps_such_a_column_as_what_nobody_reads():
    text = parse_row({"prompt": "Hi", "chosen": "a", "rejected": "b", "user": "ann"}, COLUMNS)
    assert text.prompt[0].user is None and text.meta == {"user": "ann"}
    assert labelled(text, [1.0, 0.0], False, Counts())["user"] == "ann"


def test_embeddings_are_read_from_files(tmp_path):
    arrays = {"ann": np.array(ANN), "7": np.array(LONG, dtype=np.float16)}
    np.savez(tmp_path / "u.npz", **arrays)
    save_file({name: torch.tensor(a).to(torch.bfloat16) for name, a in arrays.items()}, tmp_path / "u.safetensors")
    for name in ("u.npz", "u.safetensors"):
        named = read_users(str(tmp_path / name))
        assert embedding("ann", 2, named, name).tolist() == [ANN] and embedding(7, 2, named, name).tolist() == LONG
    assert embedding(LONG, 2, {}, None).tolist() == LONG and embedding(ANN, 2, {}, None).dtype == torch.float32


@pytest.mark.parametrize("said, why", [
    ("bab", "data.users=u.npz has no user 'bab'; did you mean 'bob'?"),
    ([1.0, 2.0, 3.0], r"its user has the shape \[3\], and model.user_width is 2: it must be \[2\] or \[tokens, 2\]"),
    ([], r"its user has the shape \[0\]"),
    ([[[1.0, 2.0]]], r"its user has the shape \[1, 1, 2\]"),
    ("bob", r"the user 'bob' of data.users=u.npz has the shape \[3\]"),
    ([1.0, float("nan")], "its user has numbers that are not finite"),
    ({"id": 3}, "neither a name nor a list of numbers"),
    ([[1.0], [1.0, 2.0]], "neither a name nor a list of numbers"),
])  # fmt: skip
def test_a_bad_embedding_is_a_bad_row(said, why):
    with pytest.raises(BadRow, match=why):
        embedding(said, 2, {"bob": torch.zeros(3)}, "u.npz")


def test_names_need_a_file():
    with pytest.raises(BadRow, match=r"its user is 'ann', a name, and no file says who that is; set data.users=FILE"):
        embedding("ann", 2, {}, None)


@pytest.mark.parametrize("name, content, why", [
    ("u.jsonl", b"{}", r"cannot read this kind of file; use .safetensors or .npz"),
    ("u.npz", None, "there is no such file"),
    ("u.npz", b"PK broken", "it cannot be read"),
    ("u.safetensors", b"broken", "it cannot be read"),
])  # fmt: skip
def test_a_bad_file_of_users_is_refused(tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data.users=.*{why}"):
        read_users(str(tmp_path / name))


def test_addresses_follow_from_the_numbers_and_not_from_the_name(folders):
    policy = policy_of(folders("sd15"))
    policy.users._named, policy.users.path = {"ann": torch.tensor(ANN)}, "u.npz"
    assert policy.prompt_ids(prompt("ann"), False) == policy.prompt_ids(prompt(ANN), False) != policy.prompt_ids(prompt(BOB), False)
    assert copy.deepcopy(policy.users) is policy.users
    with pytest.raises(BadRow, match=r"it has no user, .* data.columns.user"):
        policy.prompt_ids(prompt(), False)
    with pytest.raises(BadRow, match="model=toy is told none; add adapter=user, or set data.columns.user=null"):
        toy.policy(folders("sd15")).prompt_ids(prompt("ann"), False)


# ---- whole runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four pairs, each liked the other way round by the user of the file and by one who is given as numbers; none, and one not known."""
    root = tmp_path_factory.mktemp("data")
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{i}.png")
    rows = [{"prompt": "a red circle", "chosen": f"{2 * i + swap}.png", "rejected": f"{2 * i + 1 - swap}.png", "user": user}
            for i in range(4) for swap, user in enumerate((BOB, "ann"))]
    bad = {"good": {}, "judged": {}, "none": {"user": None}, "unknown": {"user": "ben"}, "wide": {"user": [1.0, 2.0, 3.0]}}
    for name, change in bad.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], rows[3] | change, *rows[4:]]))
    np.savez(root / "users.npz", ann=np.array([ANN, [0.5, 0.5]]))
    return root


@pytest.fixture
def run(folders, data, tmp_path):
    def go(name: str, *words: str, rows: str = "good", users: bool = True) -> int:
        named = [f"data.users={data / 'users.npz'}"] if users else []
        return train(tmp_path / name, "model=tiny-diffusion", f"model.path={folders('sd15')}", "model.resolution=16", "model.latent=[4,2]",
                     "data=pictures", f"data.path={data / f'{rows}.jsonl'}", f"data.eval={data / 'judged.jsonl'}", "train.batch_size=4",
                     "train.steps=4", "train.eval_every=4", "train.save_every=1", "evaluation.prompts=0", "optim.warmup=0", "optim.lr=1e-2",
                     *named, *words)

    return go


PPD = ["algo=ppd", "model.user_width=2"]


def test_a_run_of_ppd_goes_on_to_the_same_bits_is_started_from_and_draws_for_a_user(run, tmp_path, monkeypatch, capsys):
    assert run("whole", *PPD, "noise.user_dropout=0.2") == 0
    real, calls = Engine.step, []

    def stepping(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise SystemError("killed")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(SystemError):
            run("run", *PPD, "noise.user_dropout=0.2")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000002"
    assert run("run", *PPD, "noise.user_dropout=0.2") == 0
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    first = [r["loss"] for r in read_jsonl(tmp_path / "whole" / "metrics.jsonl") if r["split"] == "train"]
    assert first[0] == pytest.approx(0.693147, abs=1e-5) != first[-1]

    capsys.readouterr()
    assert run("second", *PPD, f"model.start={tmp_path / 'whole'}", "noise.pool=3", "reference.store=on") == 0
    start = next(r for r in read_jsonl(tmp_path / "second" / "metrics.jsonl") if r["split"] == "eval")
    end = [r for r in read_jsonl(tmp_path / "whole" / "metrics.jsonl") if r["split"] == "eval"][-1]
    assert start["logp/chosen"] == pytest.approx(end["logp/chosen"], rel=1e-6) and start["loss"] == pytest.approx(0.693147, abs=1e-6)

    def drawn(name: str, user: str) -> list[np.ndarray]:
        """The picture before and after training."""
        words = [f"run={tmp_path / 'whole'}", f"output={tmp_path / name}", "sampler.steps=2", "count=1", 'prompt="a red circle"']
        assert main(["sample", *words, f"user={user}"]) == 0
        return [np.asarray(Image.open(tmp_path / name / f"000-{when}.png")).astype(int) for when in ("before", "after")]

    (before, ann), (same, other) = drawn("ann", "ann"), drawn("other", "[-3.0,1.0]")
    assert np.array_equal(before, same), "from the same noise, and before training for nobody in particular"
    assert not np.array_equal(ann, before) and not np.array_equal(ann, other)
    capsys.readouterr()
    assert main(["sample", f"run={tmp_path / 'whole'}", 'prompt="a red circle"', "sampler.steps=2"]) == 2
    assert "the prompt: it has no user, and the model is told one" in capsys.readouterr().err


@pytest.mark.parametrize("words, rows, users, why", [
    (["algo=ppd"], "good", True, "model.user_width has no value, and adapter=user needs one"),
    ([*PPD, "model.lora.enabled=true"], "good", True, "adapter=user freezes all weights but its own"),
    (["algo=diffusion_dpo"], "good", True, "is told no users; add adapter=user"),
    (["algo=diffusion_dpo"], "good", False, "good.jsonl row 1: it has a user, and model=tiny-diffusion is told none; add adapter=user"),
    (PPD, "none", True, "none.jsonl row 4: it has no user, and the model is told one"),
    (PPD, "unknown", True, "unknown.jsonl row 4: data.users="),
    (PPD, "unknown", False, "unknown.jsonl row 2: its user is 'ann', a name, and no file says who that is"),
    (PPD, "wide", True, "wide.jsonl row 4: its user has the shape [3], and model.user_width is 2"),
    ([*PPD, "data.users=nowhere.npz"], "good", False, "data.users=nowhere.npz: there is no such file"),
], ids=["no-width", "lora", "users-unread", "column-unread", "no-user", "unknown", "no-file", "wide", "file-missing"])  # fmt: skip
def test_what_cannot_be_is_refused(words, rows, users, why, run, capsys):
    assert run("refused", *words, rows=rows, users=users) == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said
