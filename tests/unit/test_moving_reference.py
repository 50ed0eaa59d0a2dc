"""References that move, moving averages, extrapolation: what they become, when, and that a killed run goes on to the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.config.schema import ReferenceConfig, SourceConfig, TrainConfig
from prefopt.objectives.fast_slow import FastSlowDPO
from prefopt.objectives.pairwise import DPO
from prefopt.policies.arithmetic import Extrapolation, combine, combine_adapters
from prefopt.policies.reference import FrozenCopy, make_reference
from prefopt.policies.tabular import Tabular
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from prefopt.training.moving import Moving, moving_averages
from prefopt.training.source import OfflineSource
from tests.toy import micro, pair, policy, save_model
from tests.toy_runs import train
from tests.unit.test_engine import make_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama")


def moved(model, by: float) -> None:
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += by


# ---- copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [1.0, 0.6, 0.01])
def test_a_frozen_copy_takes_its_share(mix):
    table = Tabular(torch.device("cpu"))
    start = table.logits.detach().clone()
    copy = FrozenCopy(table)
    moved(table, 1.0)
    copy.refresh(mix)
    if mix == 1:
        assert torch.equal(copy.frozen.logits, table.logits)
    torch.testing.assert_close(copy.frozen.logits, start + mix)
    assert not copy.frozen.logits.requires_grad and torch.equal(table.logits, start + 1), "the policy itself stays"


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_an_adapter_takes_its_share(folder, mix):
    lora = policy(folder, {"enabled": True, "r": 2, "alpha": 4})
    moved(lora, 0.1)
    reference = make_reference(lora, "initial", moves=True)
    before = reference.state()
    before = {name: t.clone() for name, t in before.items()}
    moved(lora, 0.3)
    rows = micro(lora, pair())
    was = reference(rows)
    reference.refresh(mix)
    for name, tensor in reference.state().items():
        torch.testing.assert_close(tensor, before[name] + 0.3 * mix)
    assert float((reference(rows) - was).abs().max()) > 1e-4
    if mix == 1:
        torch.testing.assert_close(reference(rows), lora(rows).detach())
    assert {n for n in lora.trainable() if ".default." in n} == set(lora.trainable()), "only the policy's own adapter is trained"


@pytest.mark.parametrize("settings", [{}, {"enabled": True, "r": 2}])
def test_the_reference_can_write(folder, settings):
    """What it writes is what the policy would have written before it moved."""
    from prefopt.config.schema import SamplerConfig

    model, sampler = policy(folder, settings), SamplerConfig(max_new_tokens=8)
    reference, prompts = make_reference(model, "initial"), [[5, 6, 7], [8]]
    before = model.generate(prompts, sampler, seed=1)
    moved(model, 0.2)
    assert [r.ids for r in reference.generate(prompts, sampler, 1)] == [r.ids for r in before]
    assert [r.ids for r in model.generate(prompts, sampler, 1)] != [r.ids for r in before]


# ---- arithmetic -----------------------------------------------------------------------------------------


def states(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)} for _ in range(count)]


def test_combinations_are_linear_and_exact_at_the_ends():
    first, second = states(2)
    for kept, coefficients in ((first, (1, 0)), (second, (0, 1)), (first, (1.0, -0.0))):
        made = combine([first, second], coefficients)
        assert all(torch.equal(made[name], kept[name]) and made[name] is not kept[name] for name in kept)
    for c in (0.3, 0.5, 1.3):
        made = combine([first, second], (c, 1 - c))
        for name in first:
            torch.testing.assert_close(made[name], c * first[name] + (1 - c) * second[name])
    half = {name: t.bfloat16() for name, t in first.items()}
    assert combine([half, half], (0.5, 0.5))["a"].dtype == torch.bfloat16
    assert torch.equal(combine([half, half], (0.5, 0.5))["a"], half["a"])


def test_what_cannot_be_combined_is_named():
    first, second = states(2)
    for other, said in (({"a": first["a"]}, "b is not in all"), ({**second, "b": torch.ones(4)}, "b has the shapes")):
        with pytest.raises(ValueError, match=said):
            combine([first, other], (0.5, 0.5))
    with pytest.raises(ValueError, match="2 coefficients for 1 sets"):
        combine([first], (0.5, 0.5))
    place = {"position": torch.arange(3)}
    assert torch.equal(combine([place, place], (0.5, 0.5))["position"], place["position"])
    with pytest.raises(ValueError, match="position holds whole numbers, which differ"):
        combine([place, {"position": torch.arange(3) + 1}], (0.5, 0.5))


def test_adapters_are_combined_by_what_they_change():
    """The change of the model, scale B A, is linear in the coefficients, whatever ranks and scales the adapters have."""
    generator, made = torch.Generator().manual_seed(0), []
    for rank in (2, 3):
        shapes = {"x.lora_A.weight": (rank, 5), "x.lora_B.weight": (4, rank), "x.head.weight": (4,)}
        made.append({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    scales = (2.0, 0.5)
    changes = [s * m["x.lora_B.weight"] @ m["x.lora_A.weight"] for s, m in zip(scales, made, strict=True)]
    for coefficients in ((0.5, 0.5), (1.0, -0.3), (0.0, 2.0)):
        both = combine_adapters(made, scales, coefficients)
        change = both["x.lora_B.weight"] @ both["x.lora_A.weight"]
        torch.testing.assert_close(change, sum(c * w for c, w in zip(coefficients, changes, strict=True)))
        assert both["x.lora_A.weight"].shape[0] == sum(r for r, c in zip((2, 3), coefficients, strict=True) if c)
        torch.testing.assert_close(both["x.head.weight"], sum(c * m["x.head.weight"] for c, m in zip(coefficients, made, strict=True)))


# ---- extrapolation --------------------------------------------------------------------------------------


def test_extrapolation_is_that_of_log_linear_policies():
    """theta + alpha (theta - theta_0) of a softmax over logits that are linear in theta is pi^(1 + alpha) pi_0^-alpha, normalised."""
    generator, alpha = torch.Generator().manual_seed(0), 0.3
    features = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    theta = torch.randn(4, generator=generator, dtype=torch.float64)
    before = (features @ theta).softmax(0)
    ahead = Extrapolation({"theta": theta}, alpha)
    theta += torch.randn(4, generator=generator, dtype=torch.float64)
    reached = (features @ theta).softmax(0)
    ahead.jump()
    want = reached ** (1 + alpha) * before**-alpha
    assert float(((features @ theta).softmax(0) - want / want.sum()).abs().max()) < 1e-12


def test_extrapolation_by_nothing_changes_no_bit():
    table = torch.randn(3, 3)
    ahead = Extrapolation({"x": table}, 0.0)
    table += 0.1
    kept = table.clone()
    ahead.jump()
    assert torch.equal(table, kept)


def rounds_needed(alpha: float, slope: float = 0.2) -> int:
    """Proximal steps on x^2 / 2 from 1, each argmin of it + (x - y)^2 / (2 slope) around where the last one ended, extrapolated."""
    x = torch.ones(1, dtype=torch.float64)
    ahead = Extrapolation({"x": x}, alpha)
    for number in range(1, 1000):
        x /= 1 + slope
        if float(x.abs()) < 1e-3:
            return number
        ahead.jump()
    raise AssertionError("it does not converge")


def test_momentum_saves_rounds_on_a_quadratic():
    plain, *faster = (rounds_needed(alpha) for alpha in (0.0, 0.15, 0.3, 0.45))
    assert plain == math.ceil(math.log(1e3) / math.log(1.2)) and plain > faster[0] > faster[1] > faster[2]


# ---- when -----------------------------------------------------------------------------------------------


class Watched:
    """In the place of what moves: notes when, and by how much."""

    def __init__(self):
        self.calls = []

    def refresh(self, mix=1.0):
        self.calls.append((self.step, mix))

    def jump(self):
        self.calls.append((self.step, "jump"))


def moves(reference: ReferenceConfig, steps: int, stages=(0, 0, 0, 0, 1, 1, 2, 2), objective=None, **source):
    rows = make_rows(len(stages))
    for row, stage in zip(rows, stages, strict=True):
        row.stage = stage
    made = OfflineSource(rows, "pairs", 2, 1000, 0, True, 0, total=steps)
    engine = object.__new__(Engine)
    watched = Watched()
    engine.objective, engine.beside = objective or DPO(), {"reference": watched}
    cfg = TrainConfig(algo={}, reference=reference, source=SourceConfig(**source))
    moving = Moving(engine, made, cfg, {name: watched for name in engine.objective.averages()})
    for step in range(steps):
        watched.step = step
        moving(step)
    return watched.calls, moving


def test_it_moves_when_it_is_due():
    assert moves(ReferenceConfig(), 8)[0] == []
    assert moves(ReferenceConfig(refresh="steps", every=3, mix=0.6), 8)[0] == [(3, 0.6), (6, 0.6)]
    assert moves(ReferenceConfig(refresh="stage"), 4)[0] == [(2, 1.0), (3, 1.0)]
    assert moves(ReferenceConfig(refresh="stage"), 8)[0] == [(4, 1.0), (6, 1.0)]
    assert moves(ReferenceConfig(), 4, objective=FastSlowDPO(eta=0.2))[0] == [(1, 0.2), (2, 0.2), (3, 0.2)]


def test_a_reference_that_would_never_move_is_told():
    said = moves(ReferenceConfig(refresh="steps", every=512), 100)[1].stands_still(100)
    assert said == "reference: it is to move every 512 steps (reference.every), and the run is over after 100 steps, before it does"
    assert moves(ReferenceConfig(refresh="steps", every=512), 600)[1].stands_still(600) == ""
    assert moves(ReferenceConfig(), 8)[1].stands_still(8) == ""
    assert moves(ReferenceConfig(refresh="stage"), 8, stages=(0,) * 8)[1].stands_still(8).endswith("before it does")


def test_averages_start_where_the_policy_does():
    table = Tabular(torch.device("cpu"))
    made = moving_averages(FastSlowDPO(eta=0.5), table)
    assert list(made) == ["slow"] and torch.equal(made["slow"].frozen.logits, table.logits)
    moved(table, 2.0)
    made["slow"].refresh(0.5)
    torch.testing.assert_close(made["slow"].frozen.logits, table.logits - 1.0)
    assert moving_averages(DPO(), table) == {}


# ---- whole runs -----------------------------------------------------------------------------------------


BANDIT = ["model=bandit", "data=bandit", "data.limit=60", "train.batch_size=8", "train.steps=9", "train.eval_every=9", "train.save_every=2"]
ROUNDS = ["source.prompts=8", "source.epochs=2"]  # two steps to a round
RUNS = {
    "soft": ["algo=tr_dpo"],
    "hard": ["algo=tr_dpo_hard", "reference.every=4"],
    "slow": ["algo=ofs_dpo", "algo.eta=0.3"],
    "ema": ["algo=dpo", "train.ema=0.9"],
    "accelerated": ["algo=apo_accelerated", *ROUNDS],
    "rounds": ["algo=irepo", *ROUNDS],
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.steps(folder / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{f.stem} {name}": t for f in files for name, t in load_file(f).items() if name != "rng"}


@pytest.mark.parametrize("case", RUNS)
def test_a_killed_run_goes_on_to_the_same_bits(case, tmp_path, monkeypatch):
    assert train(tmp_path / "whole", *RUNS[case], *BANDIT) == 0
    real, calls = Engine.step, []

    def stepping(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise SystemError("killed")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(SystemError):
            train(tmp_path / "run", *RUNS[case], *BANDIT)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000004"
    assert train(tmp_path / "run", *RUNS[case], *BANDIT) == 0
    whole, run = weights(tmp_path / "whole"), weights(tmp_path / "run")
    held = {"slow": "slow", "ema": "ema", "accelerated": "extrapolation"}.get(case, "reference")
    assert f"{held} logits" in whole and not torch.equal(whole[f"{held} logits"], whole["weights logits"])
    assert whole.keys() == run.keys() and all(torch.equal(whole[name], run[name]) for name in whole)


def test_the_loss_starts_anew_with_each_stage(tmp_path, capsys, tiny_lm):
    """Curry-DPO on the tiny world: ln 2 at the first step of each stage where the reference moves along, else at the very first alone."""
    common = ["algo=curry_dpo", "train.steps=6", "data.limit=8", "train.batch_size=8", "evaluation.prompts=0", "optim.schedule=constant",
              "optim.warmup=0", "optim.lr=1e-3"]
    for folder, words, starts in (("moving", [], [1, 3, 5]), ("fixed", ["reference=default"], [1])):
        assert train(tmp_path / folder, *common, *words) == 0
        rows = [r for r in read_jsonl(tmp_path / folder / "metrics.jsonl") if r["split"] == "train"]
        assert [r["step"] for r in rows if abs(r["loss"] - math.log(2)) < 1e-5] == starts
        told = "it moves (reference.refresh=stage); nothing is kept in the store" in capsys.readouterr().err
        assert told == (folder == "moving")


def test_one_stage_is_plain_dpo(tmp_path, tiny_lm):
    """A curriculum of a single stage trains as DPO on the same pairs does, bit for bit."""
    common = ["transforms=curriculum", "train.steps=4", "data.limit=8", "train.batch_size=8", "evaluation.prompts=0"]
    one = ["data.transforms.pairs.keep=1", "data.transforms.curriculum.stages=1"]
    assert train(tmp_path / "one", "algo=curry_dpo", *common, *one, "reference=default") == 0
    assert train(tmp_path / "dpo", "algo=dpo", *common, *one) == 0
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.equal(tensor, weights(tmp_path / "dpo")[name])


@pytest.mark.parametrize(("words", "said"), [
    ("reference.refresh=stage", "no transform makes stages; add transforms=curriculum"),
    ("reference.refresh=stage source=rounds", "reference.refresh=stage needs given rows in stages"),
    ("reference=round", "reference.refresh=round needs rounds, and source=offline has none"),
    ("reference=ema reference.policy=base model=tiny-lm-lora", "reference.refresh=steps moves the reference to the policy"),
    ("algo=simpo reference=ema", "SimPO compares the policy with no reference"),
    ("reference=ema reference.store=on", "reference.store=on: the reference moves (reference.refresh=steps)"),
    ("reference.mix=0", "reference.mix=0.0: it must be a share, in (0, 1]"),
    ("reference.every=0", "reference.every=0: it must be at least 1"),
    ("reference.mix=0.5", "reference.mix=0.5 says how the reference moves, and with reference.refresh=never it stays where it is"),
    ("reference.every=4", "reference.every=4 says how the reference moves"),
    ("reference=ema reference.refresh=never", "reference.mix=0.6 says how the reference moves"),
    ("source.labels=soft", "source.labels=soft is for pairs made of rounds"),
    ("source=rounds source.keep=2", "source.keep=2: rejection sampling needs more samples than it keeps"),
    ("source=rounds source.keep=3 source.samples=8", "source.keep=3: it must be at least 2 and even"),
    ("algo=simpo source=rejection", "SimPO reads no reference that could write the replies"),
    ("algo=dpo_pl source=soft_rounds", "source.labels=soft labels pairs"),
    ("source=soft_rounds source.samples=4 data.pairs=all", "data.pairs=all makes several"),
    ("source=rounds source.extrapolate=1", "source.extrapolate=1.0: it must be in [0, 1)"),
    ("algo=curry_dpo train.steps=2", "train.steps=2 is less than the 3 stages of the data"),
])
def test_refused(words, said, tmp_path, capsys, tiny_lm):
    assert train(tmp_path / "run", *words.split()) == 2
    assert said in capsys.readouterr().err
