"""Methods that are rounds, on the exact table: where iREPO, RSO and accelerated DPO lead, what OFS-DPO adds, what merging domains keeps."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt.cli import main
from prefopt.config.catalogue import load_yaml, resolved_keys
from prefopt.config.schema import (
    ColumnsConfig,
    DataConfig,
    OptimConfig,
    ReferenceConfig,
    RewardConfig,
    SamplerConfig,
    SourceConfig,
    TrainConfig,
)
from prefopt.data import bandit
from prefopt.data.batch import Row
from prefopt.data.dataset import make_prompts
from prefopt.data.sources import load_data
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import Batch, Pairs, reduce_terms, total_weights
from prefopt.objectives.fast_slow import FastSlowDPO
from prefopt.objectives.pairwise import DPO
from prefopt.policies.arithmetic import combine
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.rewards.true_reward import make_rewards
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.engine import Engine, learning_rate
from prefopt.training.moving import Moving, moving_averages
from prefopt.training.online import OnlineSource, round_rows
from prefopt.training.setup import make_objective
from prefopt.training.source import OfflineSource
from tests.toy_runs import fresh_accelerator, train

DATA = DataConfig(name="bandit", source="bandit", columns=ColumnsConfig(), eval_limit=None)
REWARD = torch.tensor(bandit.reward_table(), dtype=torch.float64)
REFERENCE = torch.tensor(bandit.reference_table(), dtype=torch.float64).exp()


def optimum(beta: float) -> torch.Tensor:
    return torch.tensor(bandit.optimal_policy(beta), dtype=torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest total variation over prompts."""
    return float((a - b).abs().sum(-1).max() / 2)


def trained(slug: str, folder: Path, steps: int, lr: float, source: SourceConfig, reference: ReferenceConfig | None = None,
            schedule: str = "cosine", seed: int = 0, **settings) -> torch.Tensor:
    """[PROMPTS, REPLIES] probabilities after `steps` updates, one for each pass over a round, as a run of the loop makes them."""
    objective = make_objective({**load_yaml("algo", slug), **settings})
    cfg = TrainConfig(algo={}, source=source, reference=reference or ReferenceConfig(),
                      optim=OptimConfig(lr=lr, warmup=0.0, max_grad_norm=1e9, schedule=schedule))
    moves = cfg.reference.refresh != "never"
    with fresh_accelerator() as accelerator:
        policy = Tabular(torch.device("cpu"))
        frozen, averages = make_reference(policy, "initial", moves), moving_averages(objective, policy)
        engine = Engine(policy, objective, frozen, cfg.optim, accelerator, moves)
        batches = OfflineSource([], objective.view, 10**6, 10**6, 0, "label" in objective.columns, seed)
        prompts = make_prompts(load_data(DATA)[0], DATA, policy.prompt_ids)
        reward = make_rewards(RewardConfig(), DATA)["true_reward"]
        folder.mkdir(exist_ok=True)
        made = OnlineSource(engine, prompts, reward, source, SamplerConfig(batch_size=4096), "best_worst", folder, batches)
        moving = Moving(engine, made, cfg, averages)
        micros: list = []
        for step in range(steps):
            moving(step)
            micros = made.step(step) if made.begins(step) else micros  # passes over a round differ in the order of its rows alone
            engine.step(micros, learning_rate(step, steps, cfg.optim))
        return policy.logits.detach().double().softmax(-1)


# ---- iREPO ----------------------------------------------------------------------------------------------


def test_irepo_in_rounds_against_a_fixed_reference_reaches_the_tilted_one(tmp_path):
    """Its labels are probabilities without noise, so squares are least where beta h is the reward gap, whoever wrote the pairs."""
    source = SourceConfig("rounds", prompts=60, labels="soft", epochs=5)
    assert distance(trained("irepo", tmp_path, 200, 0.1, source, beta=1.0), optimum(1.0)) < 0.03
    assert distance(REFERENCE, optimum(1.0)) > 0.2


def test_irepo_against_the_last_round_goes_on_improving(tmp_path):
    """Two rounds of many steps, each against the policy that wrote it: the tilt adds up, pi_2 = pi_0 exp(2 r / beta)."""
    source = SourceConfig("rounds", prompts=400, labels="soft", epochs=150)
    got = trained("irepo", tmp_path, 300, 0.05, source, ReferenceConfig(refresh="round"), "constant", beta=2.0)
    assert distance(got, optimum(1.0)) < 0.02
    assert distance(got, optimum(2.0)) > 0.1


def test_soft_labels_are_the_rewards_probabilities(tmp_path, monkeypatch):
    rows = []
    real = OnlineSource._row
    monkeypatch.setattr(OnlineSource, "_row", lambda self, group, rng: rows.append((real(self, group, rng), group)) or rows[-1][0])
    source = SourceConfig("rounds", prompts=60, samples=3, labels="soft")
    trained("irepo", tmp_path, 1, 0.1, source)
    assert len(rows) == 60 and any(row.weight == 0 for row, _ in rows)
    for row, group in rows:
        gap = max(s.reward for s in group) - min(s.reward for s in group)
        assert row.label == pytest.approx(1 / (1 + math.exp(-gap)))
        assert row.weight == (0 if len({s.text for s in group}) == 1 else 1), "a tie of two texts says that both are as good"


# ---- RSO ------------------------------------------------------------------------------------------------


def test_rejection_samples_come_from_the_tilted_reference(tmp_path, monkeypatch):
    """What is kept of many replies of the reference is as if the optimum for rejection_beta had written it."""
    kept = torch.zeros(bandit.PROMPTS, bandit.REPLIES, dtype=torch.float64)
    real = OnlineSource._row

    def counting(self, group, rng):
        for sample in group:
            kept[bandit.parse(sample.text)] += 1
        return real(self, group, rng)

    monkeypatch.setattr(OnlineSource, "_row", counting)
    source = SourceConfig("rounds", "reference", prompts=480, samples=40, keep=4, rejection_beta=1.0)
    trained("rso", tmp_path, 1, 0.1, source)
    assert kept.sum() == 1920
    shares = kept / kept.sum(-1, keepdim=True)
    assert distance(shares, optimum(1.0)) < 0.1 and distance(shares, REFERENCE) > 0.2


def test_rso_reaches_the_tilted_reference(tmp_path):
    """One large round whose kept pairs carry Bradley-Terry's probabilities: DPO's optimum, since they hold for whoever wrote the pairs."""
    source = SourceConfig("rounds", "reference", prompts=120, samples=16, keep=8, labels="soft", epochs=200)
    got = trained("rso", tmp_path, 200, 0.1, source, beta=1.0)
    assert distance(got, optimum(1.0)) < 0.02 and distance(REFERENCE, optimum(1.0)) > 0.2


def test_all_of_rso_is_written_by_the_initial_policy(tmp_path):
    """However far the policy has moved, the replies have the reference's distribution."""
    words = ["model=bandit", "data=bandit", "data.limit=60", "train.batch_size=64", "source.prompts=64", "source.samples=16"]
    words += ["source.keep=4", "train.steps=4", "optim.lr=0.5", "optim.warmup=0", "optim.schedule=constant"]
    assert train(tmp_path / "run", "algo=rso", *words) == 0
    last = sorted((tmp_path / "run" / "rounds").iterdir())[-1]
    counts = torch.zeros(bandit.PROMPTS, bandit.REPLIES, dtype=torch.float64)
    for row in read_jsonl(last):
        counts[bandit.parse(row["text"])] += 1
    counts /= counts.sum(-1, keepdim=True)
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")["logits"].double().softmax(-1)
    assert distance(counts, REFERENCE) < 0.12 < distance(counts, model)


@pytest.mark.parametrize(("view", "pairs", "rows"), [
    ("pairs", "best_worst", 40), ("unary", "best_worst", 40), ("pairs", "all", 10), ("ranking", "best_worst", 10),
    ("demonstrations", "best_worst", 10),
])
def test_rows_of_a_round(view, pairs, rows):
    assert round_rows(SourceConfig("rounds", prompts=10, samples=16, keep=8), view, pairs) == rows
    assert round_rows(SourceConfig("rounds", prompts=10, samples=16), view, pairs) == 10


def test_steps_count_kept_pairs(tmp_path):
    """8 prompts with 8 kept replies each are 32 pairs: a step of train.batch_size=32, and every pair is of replies that were kept."""
    values = {key: line.value for key, line in resolved_keys("source", "rejection").items()}
    assert (values["prompts"], values["samples"], values["keep"], values["writer"]) == ("8", "64", "8", "reference")
    assert train(tmp_path / "run", "algo=rso", "model=bandit", "data=bandit", "train.steps=3", "train.batch_size=32") == 0
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert [r["samples"] for r in rows] == [512, 1024, 1536]


# ---- accelerated ----------------------------------------------------------------------------------------


ROUNDS = ["model=bandit", "data=bandit", "data.limit=60", "train.batch_size=16", "train.steps=8", "source.prompts=32", "source.samples=4"]


def test_without_momentum_it_is_iterative_dpo_bit_for_bit(tmp_path):
    assert train(tmp_path / "apo", "algo=apo_accelerated", *ROUNDS, "source.extrapolate=0") == 0
    assert train(tmp_path / "dpo", "algo=online_dpo", *ROUNDS, "reference=round") == 0
    assert train(tmp_path / "ahead", "algo=apo_accelerated", *ROUNDS) == 0
    one, two, ahead = (load_file(tmp_path / f / "model" / "model.safetensors")["logits"] for f in ("apo", "dpo", "ahead"))
    assert torch.equal(one, two) and not torch.equal(one, ahead)


def test_momentum_goes_further_in_the_same_rounds(tmp_path):
    """Three rounds, each trained to its optimum on noiseless probabilities: the policy is where more rounds without momentum lead."""
    source = {"kind": "rounds", "prompts": 400, "labels": "soft", "epochs": 150}
    beta, tilts = 2.0, {}
    for alpha in (0.0, 0.5):
        rounds, reference = SourceConfig(**source, extrapolate=alpha), ReferenceConfig(refresh="round")
        tilts[alpha] = trained("irepo", tmp_path / f"{alpha}", 450, 0.05, rounds, reference, "constant", beta=beta)
    # theta_1 = 1.5 (of r / beta), reached 2.5; theta_2 = 2.5 + 0.5 * 1.5 = 3.25, reached 4.25
    assert distance(tilts[0.0], optimum(beta / 3)) < 0.03
    assert distance(tilts[0.5], optimum(beta / 4.25)) < 0.05
    assert float((tilts[0.5] * REWARD).sum()) > float((tilts[0.0] * REWARD).sum())


# ---- fast and slow --------------------------------------------------------------------------------------


def scored(policy: list[float], reference: list[float], slow: list[float]) -> Batch:
    """One token to each of 2 P edges, chosen ones first."""
    count = len(policy) // 2
    one, edges = torch.ones(count, dtype=torch.float64), torch.arange(2 * count)
    pairs = Pairs(edges[:count], edges[count:], one, one, 0 * one)
    made = {name: {"logp": torch.tensor(values, dtype=torch.float64)} for name, values in
            (("policy", policy), ("reference", reference), ("slow", slow))}
    return Batch(torch.ones(2 * count, dtype=torch.long), edges, made, pairs=pairs)


def gradient(objective, batch: Batch) -> tuple[float, torch.Tensor]:
    leaf = batch.scores["policy"]["logp"].clone().requires_grad_()
    batch.scores["policy"] = {"logp": leaf}
    loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, batch))
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def test_ofs_dpo_without_the_chase_is_dpo():
    scores = ([-3.0, -2.0, -4.0, -1.5], [-3.5, -2.5, -3.0, -1.0], [-2.0, -4.0, -1.0, -2.0])
    (loss, grad), (plain, plain_grad) = (gradient(o, scored(*scores)) for o in (FastSlowDPO(beta=0.7, alpha=0.0), DPO(beta=0.7)))
    assert loss == pytest.approx(plain, abs=1e-15) and torch.equal(grad, plain_grad)


@pytest.mark.parametrize(("lead", "direction"), [(0.0, -1), (0.4, 1)])
def test_the_chase_pushes_below_the_margin_and_holds_above(lead, direction):
    """Its own gradient on h, which is DPO's left out."""
    h = math.log((0.5 + lead) / (0.5 - lead))
    scores = ([h, 0.0], [0.0, 0.0], [0.0, 0.0])
    chase, plain = (gradient(FastSlowDPO(beta=1.0, alpha=a, margin=0.2), scored(*scores))[1][0] for a in (1.0, 0.0))
    assert math.copysign(1, chase - plain) == direction


def test_the_slow_copy_lags_behind(tmp_path):
    """It stays between the start and the policy, nearer to the start the smaller eta is."""
    gaps = []
    for eta in (0.02, 0.5):
        run = tmp_path / f"{eta}"
        assert train(run, "algo=ofs_dpo", "model=bandit", "data=bandit", "data.limit=60", "train.steps=20", "optim.lr=0.05",
                     "train.batch_size=60", f"algo.eta={eta}") == 0
        (last,) = sorted((run / "checkpoints").glob("step-000020"))
        slow, fast = (load_file(last / f"{name}.safetensors")["logits"] for name in ("slow", "weights"))
        start = torch.tensor(bandit.reference_table())
        gaps.append(float((slow - start).norm() / (fast - start).norm()))
    assert 0 < gaps[0] < 0.3 < gaps[1] < 1


@pytest.mark.usefixtures("tiny_lm")
def test_at_equal_rates_and_without_the_chase_both_adapters_are_those_of_dpo(tmp_path):
    """Bit for bit. The slow copy follows after a step, so a checkpoint holds it as the policy was one step before."""
    words = ["model=tiny-lm-lora", "model.lora.learning_rate=1e-2", "train.steps=3", "train.save_every=1", "train.keep_checkpoints=9"]
    assert train(tmp_path / "ofs", "algo=ofs_dpo", "algo.alpha=0", "algo.eta=1", *words) == 0
    assert train(tmp_path / "dpo", "algo=dpo", *words) == 0
    ofs, dpo = ([load_file(tmp_path / name / "checkpoints" / f"step-00000{n}" / "weights.safetensors") for n in (1, 2, 3)]
                for name in ("ofs", "dpo"))
    slow = [load_file(tmp_path / "ofs" / "checkpoints" / f"step-00000{n}" / "slow.safetensors") for n in (1, 2, 3)]

    def bits(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [state[name] for name in sorted(state)]

    for n in range(3):
        assert all(torch.equal(a, b) for a, b in zip(bits(ofs[n]), bits(dpo[n]), strict=True))
    for n in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(bits(slow[n]), bits(dpo[n - 1]), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(bits(dpo[0]), bits(dpo[1]), strict=True))


# ---- several domains ------------------------------------------------------------------------------------


def domain(rewards: torch.Tensor) -> list[Row]:
    """Every pair of replies of every prompt, labelled by Bradley-Terry's probability."""
    rows = []
    for x in range(bandit.PROMPTS):
        for a in range(bandit.REPLIES):
            for b in range(a + 1, bandit.REPLIES):
                label = 1 / (1 + math.exp(float(rewards[x, b] - rewards[x, a])))
                rows.append(Row(Tokens([x], [Branch([y], [True], True) for y in (a, b)]), "pair", label=label))
    return rows


def learned(rewards: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The table after OFS-DPO on a domain, from `start`, against the world's reference."""
    objective, optim = FastSlowDPO(beta=0.5), OptimConfig(lr=0.1, warmup=0.0, max_grad_norm=1e9)
    with fresh_accelerator() as accelerator:
        policy = Tabular(torch.device("cpu"))
        reference = make_reference(policy, "initial")
        policy.logits.data.copy_(start)
        averages = moving_averages(objective, policy)
        engine = Engine(policy, objective, reference, optim, accelerator)
        rows = domain(rewards)
        source = OfflineSource(rows, "pairs", len(rows), 10**6, 0, True, 0)
        moving, whole = Moving(engine, source, TrainConfig(algo={}), averages), source.step(0)
        for step in range(150):
            moving(step)
            engine.step(whole, learning_rate(step, 150, optim))
        return policy.logits.detach().clone()


def accuracy(table: torch.Tensor, rewards: torch.Tensor) -> float:
    """Share of pairs that the table's DPO reward orders as the domain does."""
    gain = table.double().log_softmax(-1) - REFERENCE.log()
    right = [float((gain[x, a] - gain[x, b]) * (rewards[x, a] - rewards[x, b]) > 0)
             for x in range(bandit.PROMPTS) for a in range(bandit.REPLIES) for b in range(a + 1, bandit.REPLIES)]
    return sum(right) / len(right)


def test_merging_domains_keeps_what_the_first_one_taught(tmp_path):
    """Two domains that disagree on a good part of the pairs. Training on the second after the first forgets; COFS-DPO's combination of
    one run for each keeps more of the first, and most of the second."""
    rng = random.Random(0)
    other = torch.tensor([[rng.uniform(-2, 2) for _ in range(bandit.REPLIES)] for _ in range(bandit.PROMPTS)], dtype=torch.float64)
    start = torch.tensor(bandit.reference_table())
    first, second = learned(REWARD, start), learned(other, start)
    sequential = learned(other, first)
    both = combine([{"logits": first}, {"logits": second}], (0.5, 0.5))["logits"]
    assert accuracy(first, REWARD) > 0.95 < accuracy(sequential, other)
    assert accuracy(both, REWARD) > accuracy(sequential, REWARD) + 0.1
    assert accuracy(both, other) > accuracy(first, other) + 0.1


def finished(folder: Path, tensors: dict[str, torch.Tensor], adapter: str | None = None) -> str:
    (folder / "model").mkdir(parents=True)
    save_file(tensors, folder / "model" / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    if adapter:
        (folder / "model" / "adapter_config.json").write_text(adapter)
    return str(folder)


def test_merge_command(tmp_path, capsys):
    tables = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    a, b = (finished(tmp_path / name, {"logits": t}) for name, t in zip("ab", tables, strict=True))
    assert main(["merge", a, b, "weights=[0.25,0.75]", f"output={tmp_path / 'ab'}"]) == 0
    merged = load_file(tmp_path / "ab" / "model.safetensors")["logits"]
    torch.testing.assert_close(merged, 0.25 * tables[0] + 0.75 * tables[1])
    assert main(["merge", a, b, "weights=[1,0]", f"output={tmp_path / 'first'}"]) == 0
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model" / "model.safetensors").read_bytes()
    assert main(["merge", str(tmp_path / "ab"), a, "weights=[2,-1]", f"output={tmp_path / 'again'}"]) == 0, "a merged model is a model"
    capsys.readouterr()


def test_merged_adapters_add_up(tmp_path):
    generator = torch.Generator().manual_seed(0)
    runs, changes = [], []
    for rank, alpha in ((2, 4), (4, 4)):
        parts = {"x.lora_A.weight": torch.randn(rank, 5, generator=generator), "x.lora_B.weight": torch.randn(3, rank, generator=generator)}
        runs.append(finished(tmp_path / f"{rank}", parts, f'{{"r": {rank}, "lora_alpha": {alpha}, "base_model_name_or_path": "m"}}'))
        changes.append(alpha / rank * parts["x.lora_B.weight"] @ parts["x.lora_A.weight"])
    assert main(["merge", *runs, "weights=[1,0]", f"output={tmp_path / 'first'}"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (Path(runs[0]) / "model" / name).read_bytes(), "the first domain's, bit for bit"
    assert main(["merge", *runs, "weights=[0.5,0.7]", f"output={tmp_path / 'both'}"]) == 0
    made = load_file(tmp_path / "both" / "adapter_model.safetensors")
    about = (tmp_path / "both" / "adapter_config.json").read_text()
    assert '"r": 6' in about and '"lora_alpha": 6' in about
    torch.testing.assert_close(made["x.lora_B.weight"] @ made["x.lora_A.weight"], 0.5 * changes[0] + 0.7 * changes[1])


def test_layers_trained_whole_beside_an_adapter_need_weights_that_add_up_to_one(tmp_path, capsys):
    runs, heads = [], [torch.full((2, 2), 1.0), torch.full((2, 2), 3.0)]
    for i, head in enumerate(heads):
        parts = {"x.lora_A.weight": torch.ones(2, 5), "x.lora_B.weight": torch.ones(3, 2), "base_model.model.lm_head.weight": head}
        runs.append(finished(tmp_path / f"{i}", parts, '{"r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]}'))
    assert main(["merge", *runs, "weights=[0.25,0.75]", f"output={tmp_path / 'both'}"]) == 0
    made = load_file(tmp_path / "both" / "adapter_model.safetensors")
    assert torch.equal(made["base_model.model.lm_head.weight"], torch.full((2, 2), 2.5))
    assert main(["merge", *runs, "weights=[1,0.5]", f"output={tmp_path / 'more'}"]) == 2 and not (tmp_path / "more").exists()
    said = capsys.readouterr().err
    assert "holds base_model.model.lm_head.weight, which was trained whole" in said and "the weights add up to 1.5" in said


@pytest.mark.parametrize(("words", "said"), [
    ("{a} {b} weights=[0.5] output={o}", "weights=[0.5] has 1 numbers for 2 runs"),
    ("{a} {b} weights=[0.5,x] output={o}", "it is a list of numbers"),
    ("{a} {b} weights=[0.5,0.4] output={o}", "the weights add up to 0.9; for whole models they must add up to 1"),
    ("{a} {b} weights=[0,0] output={o}", "all weights are 0"),
    ("{a} {c} weights=[0.5,0.5] output={o}", "logits has the shapes [4, 6], [2, 6]; they must be of one model"),
    ("{a} {none} weights=[0.5,0.5] output={o}", "has no trained model"),
    ("{a} {b} weights=[0.5,0.5] output={a}", "exists already"),
    ("{a} {b} weights=[0.5,0.5]", "prefopt merge needs output=..."),
    ("{a} {b} wieghts=[0.5,0.5] output={o}", "prefopt merge has no option wieghts; did you mean 'weights'?"),
])
def test_merge_refuses(words, said, tmp_path, capsys):
    names = {name: finished(tmp_path / name, {"logits": torch.zeros(4 if name != "c" else 2, 6)}) for name in "abc"}
    assert main(["merge", *words.format(**names, none=tmp_path / "none", o=tmp_path / "o").split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
