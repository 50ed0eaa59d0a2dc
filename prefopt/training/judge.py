"""Judging a policy on held-out data: loss and accuracy on pairs; reward, win rate, KL and length on samples.

What each number means and how its interval is made: docs/judging.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from prefopt.config.rounds import HELD_OUT
from prefopt.config.schema import SamplerConfig
from prefopt.data.batch import MicroBatch, Row
from prefopt.data.records import Completion, Example, Message
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import Batch, Objective, unit_weight
from prefopt.policies.reference import Provider, Reloaded
from prefopt.report import picture_measures
from prefopt.report.calibration import calibration, compared
from prefopt.report.estimators import by_prompt, distinct, interval, kendall, length_controlled, wins
from prefopt.rewards.pictures import LOOK, PARTS
from prefopt.rewards.true_reward import RewardFunction
from prefopt.training.coupling import gather_batches, join
from prefopt.training.engine import Engine, quantities
from prefopt.training.metrics import TIE
from prefopt.training.source import OfflineSource

COMPARABLE = ("pair", "ranking", "ranking_all")  # kinds of rows in which one completion is preferred to another
REWARDS = ("true_reward", "reward")  # of samples
# Of pictures: accuracy on the draws in each quarter of the process, named by the share of it at which the quarter begins, in percent.
AT_TIMES = ("accuracy_at/0", "accuracy_at/25", "accuracy_at/50", "accuracy_at/75")
# Measures in [0, 1], whose intervals stay there.
SHARES = (
    "accuracy", "ranking_accuracy", "ranking_accuracy_per_token", "reference_ranking_accuracy", "reference_ranking_accuracy_per_token",
    "win_rate", "lc_win_rate", "finished", "distinct_2", "ece", "saturation", "high_frequency", "prompt_match", "all_parts",
    *(f"match/{part}" for part in PARTS), *AT_TIMES,
)  # fmt: skip
# Measures whose interval is written at every evaluation of a run; `prefopt eval` gives it for all of them.
WITH_INTERVAL = (
    "accuracy", "ranking_accuracy", *REWARDS, "win_rate", "lc_win_rate", "kl", "prompt_match", "variety", "saturation", "high_frequency",
    "start_distance",
)  # fmt: skip


Table = dict[int, list[float]]  # row -> one number for each of its replies
Unit = tuple[int, float, float]  # of a term: row, value, weight


@dataclass
class Reading:
    """What is kept of scored rows: `tokens`, `policy` and `reference` (log-probs) and `rewards` of each reply; of pictures also
    `policy_draws` and `reference_draws`, the log-probs of each draw, one picture after the other; name -> (weight, units) of the
    objective's terms."""

    tables: dict[str, Table] = field(default_factory=dict)
    units: dict[str, tuple[float, list[Unit]]] = field(default_factory=dict)


@dataclass
class Judgement:
    """Measures of a policy. Each is a vector with one value per prompt, whose mean is the measure (see report/estimators.py)."""

    pairs: dict[str, np.ndarray] = field(default_factory=dict)  # over the prompts of the held-out rows
    replies: dict[str, np.ndarray] = field(default_factory=dict)  # over the prompts that were sampled
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def measures(self) -> dict[str, np.ndarray]:
        return self.pairs | self.replies

    def row(self, with_interval: Sequence[str] | None = None) -> dict[str, float]:
        """`name`, and for those in `with_interval` (None: all) `name_low` and `name_high`, the ends of the 95 % interval."""
        out: dict[str, float] = {}
        for name, values in self.measures.items():
            found = interval(values, name in SHARES)
            out[name] = found.mean
            if (with_interval is None or name in with_interval) and math.isfinite(found.low):
                out |= {f"{name}_low": found.low, f"{name}_high": found.high}
        return out


@dataclass
class Judge:
    """Everything an evaluation needs. `initial` scores tokens under the policy the run started from (None: KL is not measured);
    an empty `baseline` means no win rates."""

    engine: Engine
    held_out: OfflineSource | None
    prompts: list[Example]
    sampler: SamplerConfig
    seed: int
    rewards: dict[str, RewardFunction]  # metric name -> function
    initial: Provider | None
    baseline: dict[int, dict[str, Any]] | None = None  # the initial policy's sample for each prompt
    reference_judged: bool = False
    parts: Callable[[str, Any], dict[str, float]] | None = None  # see `prefopt.rewards.pictures.parts`
    start: dict[str, Table] = field(default_factory=dict, init=False)  # see `_start`
    drawn: list[tuple[list[int], Branch]] = field(default_factory=list, init=False)  # (prompt, reply) of the last samples
    start_drawn: list[tuple[list[int], Branch]] = field(default_factory=list, init=False)  # the initial policy's, see `_forward_kl`

    @property
    def main_reward(self) -> str | None:
        """The reward that decides who wins: the known one if there is one."""
        return next((name for name in REWARDS if name in self.rewards), next(iter(self.rewards), None))

    @property
    def _pictures(self) -> bool:
        return getattr(self.engine.policy, "layout", "") == "draws"

    @property
    def draws_another(self) -> bool:
        """Whether another model draws the samples, away from what the policy says: their log-prob under the policy tells no KL."""
        return self._pictures and self.engine.policy.sides[0] is not None

    def __call__(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(metrics row, sample rows) of the policy as it stands."""
        judgement = self.measure(step)
        return judgement.row([*WITH_INTERVAL, *(m for m in judgement.measures if m.startswith(HELD_OUT))]), judgement.samples

    def measure(self, step: int) -> Judgement:
        """Judges the policy as it stands. Its first samples become the baseline of win rates, unless there is one."""
        out, policy = Judgement(), self.engine.policy
        was_training = policy.training
        policy.eval()
        try:
            with torch.no_grad():
                if self.held_out is not None and self.held_out.rows:
                    out.pairs = self._pairs()
                if self.prompts and policy.quantity != "reward":  # a reward model writes nothing
                    if isinstance(self.initial, Reloaded) and self._is_exact:
                        self.initial.ready()
                    with self.engine.parallel.whole():  # processes sample their own prompts, each in as many passes as it needs
                        samples = self._sample(step)
                        forward = self._forward_kl()
                    out.samples = sorted(gather_object(samples) if self.engine.world > 1 else samples, key=lambda s: s["id"])
        finally:
            policy.train(was_training)
            if isinstance(self.initial, Reloaded):
                self.initial.release()
        if out.samples:
            if self.baseline is None and (self.rewards or self._pictures):
                self.baseline = {s["id"]: s for s in out.samples}
            out.replies = self.describe(out.samples, self.baseline) | forward
        return out

    # ---- held-out rows ---------------------------------------------------------------------------

    def _pairs(self) -> dict[str, np.ndarray]:
        """Loss in the objective's own view; what the scores say of every two completions of which one is preferred."""
        source, engine, out = self.held_out, self.engine, {}
        comparable, direct = any(row.kind in COMPARABLE for row in source.rows), source.view in ("pairs", "unary", "ranking")
        found = self._scored(source.view, rewards=comparable and direct)
        if engine.objective.view == source.view and not engine.objective.stepwise:  # groups and steps are sampled while training
            out["loss"] = self._loss(found.units)
        if not comparable:
            return out | self._single(found.tables)
        tables = (found if direct else self._scored("pairs", rewards=True)).tables
        start = self._start(tables, "pairs") if "policy" in tables else {}
        tables = {name: table for name, table in tables.items() if not name.startswith("reference")}
        if start:
            tables["start"] = start["policy"]
            if not self.reference_judged:  # it does not change, so one row of metrics is enough
                tables["reference"] = start["policy"]
            if "policy_draws" in start:
                out |= self._at_times(tables["policy_draws"], start["policy_draws"])
        self.reference_judged = True
        out |= self._preferences(tables)
        if engine.policy.quantity == "reward":  # its differences are logits of Bradley-Terry, so they can be right or wrong
            pairs, logits, labels = compared(source.rows, tables["rewards"])
            prompts = [self._prompt(row) for row, _, _ in pairs]
            out |= {name: by_prompt(values, prompts) for name, values in calibration(logits, labels).items()}
        return out

    def _start(self, tables: Mapping[str, Table], view: str) -> dict[str, Table]:
        """`policy` and, of pictures, `policy_draws` (as in `Reading`) under the reference, or where that moves or is not read under the
        initial policy; found once. Empty where neither is in memory."""
        engine = self.engine
        if not self.start:
            provider = self.initial or (None if engine.moving_reference else engine.reference)
            if "reference" in tables and not engine.moving_reference:
                names = {"reference": "policy", "reference_draws": "policy_draws"}
                self.start = {names[name]: table for name, table in tables.items() if name in names}
            elif provider is not None:
                self.start = self._scored(view, provider).tables
        return self.start

    def _single(self, tables: Mapping[str, Table]) -> dict[str, np.ndarray]:
        """Log-ratios of replies that are compared with no other: demonstrations and what is liked, and what is not."""
        if "policy" not in tables or not (start := self._start(tables, self.held_out.view)):
            return {}
        logp, start, out = tables["policy"], start["policy"], {}
        for name, wanted in (("log_ratio/chosen", True), ("log_ratio/rejected", False)):
            found = [(r, i) for r in sorted(start) for i, liked in enumerate(self.held_out.rows[r].desirable or [True]) if liked == wanted]
            if found:
                out[name] = by_prompt(np.array([logp[r][i] - start[r][i] for r, i in found]), [self._prompt(r) for r, _ in found])
        return out

    @torch.no_grad()
    def rewards_of_rows(self) -> Table:
        """The objective's reward of every reply of the held-out rows: row -> one number for each reply."""
        policy = self.engine.policy
        was_training = policy.training
        policy.eval()
        try:
            return self._scored("pairs", rewards=True).tables["rewards"]
        finally:
            policy.train(was_training)

    def _scored(self, view: str, scorer: Provider | None = None, rewards: bool = False) -> Reading:
        """What is read of the held-out rows of all ranks; with the objective's `rewards`, if asked for. `scorer`: score under it, as
        `policy`.

        A micro-batch is read as soon as it is scored, so that what is large (hidden states) is neither kept nor sent. An objective that
        needs the scores of the whole batch gets those of all rows at once.
        """
        engine, parts, batches, rows = self.engine, [], [], []
        coupled = scorer is None and engine.objective.coupling == "global"
        for micro in self.held_out.everything(view):
            micro = micro.to(engine.accelerator.device)
            of = self._rows_of_edges(micro, view)
            if scorer is not None:
                batch = replace(micro.layout, scores={"policy": quantities(scorer(micro), micro.layout)})
                parts.append(_read(batch, of))
                continue
            batch = engine.score(micro, engine.policy)
            if coupled:
                batches.append(batch)
                rows += of
            else:
                parts.append(_read(batch, of, engine.objective, rewards, view))
        if coupled:
            whole = join(gather_batches(join(batches), engine.world))
            parts = [_read(whole, gather_object(rows) if engine.world > 1 else rows, engine.objective, rewards, view)]
        elif engine.world > 1:
            parts = gather_object(parts)
        found = Reading()
        for part in parts:
            for name, table in part.tables.items():
                found.tables.setdefault(name, {}).update(table)
            for name, (weight, units) in part.units.items():
                found.units.setdefault(name, (weight, []))[1].extend(units)
        return found

    def _rows_of_edges(self, micro: MicroBatch, view: str) -> list[int]:
        if not micro.rows:
            return [-1] * len(micro.layout.lengths)
        return [number for number in micro.rows for _ in self.held_out.rows[number].edges(view)]

    def _loss(self, terms: Mapping[str, tuple[float, list[Unit]]]) -> np.ndarray:
        """[G] the objective's loss, split over prompts. What couples a batch (KTO's KL estimate) is held at its value."""
        total: np.ndarray | float = 0.0
        for weight, units in terms.values():
            if not any(share for _, _, share in units):
                continue
            # Sorted, so that prompts come in the same order for every term and however the rows were split.
            rows, values, weights = zip(*sorted(units, key=lambda unit: unit[0]), strict=True)
            total = total + weight * by_prompt(np.array(values), [self._prompt(row) for row in rows], np.array(weights))
        return np.atleast_1d(total)

    def _prompt(self, row: int) -> tuple[int, ...]:
        return tuple(self.held_out.rows[row].tokens.prompt)

    def _preferences(self, tables: Mapping[str, Table]) -> dict[str, np.ndarray]:
        """Measures of completions of which one is preferred; a soft label below one half prefers the second, one half prefers none."""
        pairs: list[tuple[int, int, int]] = []  # (row, preferred completion, other completion)
        taus: dict[str, list[float]] = {}
        tau_rows = []
        for number, row in enumerate(self.held_out.rows):
            pairs += [(number, a, b) for a, b in preferred(row)]
            if row.kind == "ranking_all" and len(set(row.scores)) > 1:
                tau_rows.append(number)
                for scorer, name in (("rewards", "kendall_tau"), ("policy", "ranking_kendall_tau")):
                    if scorer in tables:
                        taus.setdefault(name, []).append(kendall(tables[scorer][number], row.scores))
        if not pairs:
            return {}
        prompts = [self._prompt(number) for number, _, _ in pairs]

        def sides(scorer: str, per_token: bool = False) -> tuple[np.ndarray, np.ndarray]:
            table, tokens = tables[scorer], tables["tokens"]
            found = [[table[r][i] / (tokens[r][i] if per_token else 1) for i in (a, b)] for r, a, b in pairs]
            return tuple(np.array(found).T)

        units: dict[str, np.ndarray] = {}
        if "rewards" in tables:
            chosen, rejected = sides("rewards")
            units |= {"reward/chosen": chosen, "reward/rejected": rejected, "reward/margin": chosen - rejected}
            units["accuracy"] = wins(chosen, rejected, TIE)
        if "policy" in tables:
            chosen, rejected = sides("policy")
            units |= {"logp/chosen": chosen, "logp/rejected": rejected}
            if "start" in tables:
                start = sides("start")
                units |= {"log_ratio/chosen": chosen - start[0], "log_ratio/rejected": rejected - start[1]}
        for scorer, prefix in (("policy", ""), ("reference", "reference_")):
            if scorer in tables:
                units[f"{prefix}ranking_accuracy"] = wins(*sides(scorer))
                if not self._pictures:  # these have as many draws each
                    units[f"{prefix}ranking_accuracy_per_token"] = wins(*sides(scorer, per_token=True))
        out = {name: by_prompt(values, prompts) for name, values in units.items()}
        return out | {name: by_prompt(values, [self._prompt(r) for r in tau_rows]) for name, values in taus.items()}

    def _at_times(self, policy: Table, start: Table) -> dict[str, np.ndarray]:
        """Accuracy of the log-ratio at single draws, in each quarter of the process that has any. A pair's pictures share their draws."""
        draws, found = self.engine.policy.draws, {name: ([], [], []) for name in AT_TIMES}
        for number, row in enumerate(self.held_out.rows):
            _, _, group, *drawn = row.tokens.branches[0].ids
            ratios = (np.array(policy[number]) - np.array(start[number])).reshape(-1, len(drawn))
            for k, draw in enumerate(drawn):
                ours, theirs, prompts = found[AT_TIMES[int(4 * draws.time(group, draw)[0])]]
                for a, b in preferred(row):
                    ours.append(ratios[a, k]), theirs.append(ratios[b, k]), prompts.append(self._prompt(number))
        return {name: by_prompt(wins(ours, theirs, TIE), prompts) for name, (ours, theirs, prompts) in found.items() if prompts}

    # ---- samples ---------------------------------------------------------------------------------

    def _sample(self, step: int) -> list[dict[str, Any]]:
        """This process's share of one reply per held-out prompt, with its rewards and its log-ratio to the initial policy. Noise follows
        from (seed, prompt): it is the same at every step, and on any number of processes."""
        engine, policy = self.engine, self.engine.policy
        rank, world = engine.accelerator.process_index, engine.world
        mine = list(range(rank, len(self.prompts), world))
        ids = [policy.prompt_ids(self.prompts[i].prompt, self.prompts[i].chat) for i in mine]
        replies = policy.generate(ids, self.sampler, self.seed, mine) if mine else []
        self.drawn = [(prompt, reply.branch) for prompt, reply in zip(ids, replies, strict=True)]
        log_ratios = self._log_ratios(ids, [r.branch for r in replies])
        answered = [answer(self.prompts[i], reply.text, getattr(reply, "image", None)) for i, reply in zip(mine, replies, strict=True)]
        rewards = {name: reward(answered) for name, reward in self.rewards.items()} if mine else {}
        out = []
        for k, (i, reply, log_ratio) in enumerate(zip(mine, replies, log_ratios, strict=True)):
            own = {name: values[k] for name, values in rewards.items()}
            made = {"image": reply.image} if self._pictures else {
                "completion": reply.text, "tokens": len(reply.ids), "finished": reply.finished}  # fmt: skip
            out.append({
                "step": step, "id": i, "prompt": self.prompts[i].prompt_text, **made, "reward": own.get(self.main_reward),
                "log_ratio": log_ratio, **({"rewards": own} if len(own) > 1 else {}),
            })
        return out

    @property
    def _is_exact(self) -> bool:
        """Whether samples are the policy's own: temperature and nucleus sampling draw from another distribution than the one whose KL is
        meant."""
        return self._pictures or self.sampler.temperature == self.sampler.top_p == 1

    def _forward_kl(self) -> dict[str, np.ndarray]:
        """log pi_0(y|x) - log pi(y|x) of what the initial policy has written (`start_drawn`), nats: its mean estimates KL(pi_0 || pi)."""
        found = self._log_ratios([p for p, _ in self.start_drawn], [r for _, r in self.start_drawn])
        return {} if None in found or not found else {"forward_kl": -np.array(found, dtype=float)}

    def _log_ratios(self, prompts: list[list[int]], replies: list[Branch]) -> list[float | None]:
        """log pi(y|x) - log pi_0(y|x) of samples, nats: exact per sequence, so its mean estimates KL(pi || pi_0). Of pictures it is the
        difference of scores at the draws that held-out pictures are judged at."""
        if self.initial is None or not prompts or not self._is_exact or self.draws_another:
            return [None] * len(prompts)
        rows = [Row(Tokens(p, [r]), "demonstration") for p, r in zip(prompts, replies, strict=True)]
        budget, policy = self.held_out.budget if self.held_out else 4096, self.engine.policy
        pictures = {"layout": policy.layout, "draws": policy.draws} if self._pictures else {}
        source = OfflineSource(rows, "demonstrations", len(rows), budget, policy.pad, False, 0, **pictures)
        ratios: list[float | None] = [None] * len(rows)
        for micro in source.everything("demonstrations"):
            micro = micro.to(self.engine.accelerator.device)
            now, start = (quantities(f(micro), micro.layout)["logp"] for f in (policy, self.initial))
            for row, value in zip(micro.rows, (now - start).tolist(), strict=True):
                ratios[row] = value
        return ratios

    def describe(self, samples: Sequence[dict[str, Any]], baseline: Mapping[int, dict[str, Any]] | None) -> dict[str, np.ndarray]:
        """Measures of samples: one value per prompt. Win rates are against `baseline`'s sample for the same prompt, ties half."""
        texts = not self._pictures
        out = {"length": [s["tokens"] for s in samples], "finished": [float(s["finished"]) for s in samples]} if texts else {}
        for name in self.rewards:
            out[name] = [s["rewards"][name] if "rewards" in s else s["reward"] for s in samples]
        if self.rewards and baseline:
            theirs = [baseline[s["id"]] for s in samples]
            out["win_rate"] = wins([s["reward"] for s in samples], [t["reward"] for t in theirs])
            if texts:
                longer = np.array([s["tokens"] - t["tokens"] for s, t in zip(samples, theirs, strict=True)], dtype=float)
                out["lc_win_rate"] = length_controlled(out["win_rate"], longer)
        if samples[0]["log_ratio"] is not None:
            out["kl"] = [s["log_ratio"] for s in samples]
        if texts:
            out["distinct_2"] = distinct([s["completion"] for s in samples])
        else:
            images = [s["image"] for s in samples]
            out |= picture_measures.measures(images)
            if baseline and all("image" in baseline.get(s["id"], {}) for s in samples):
                out["start_distance"] = picture_measures.distance(images, [baseline[s["id"]]["image"] for s in samples])
            if self.parts:
                met = [self.parts(s["prompt"], s["image"]) for s in samples]
                out[f"{HELD_OUT}look"] = [seen.pop(LOOK) for seen in met]
                out |= picture_measures.prompt_match(met, range(len(met)))
        return {name: np.array(values, dtype=float) for name, values in out.items() if values is not None}


def answer(prompt: Example, text: str, image: Any = None) -> Example:
    """The prompt with this text or picture as its one completion: what reward functions take."""
    part = {"type": "text", "text": text} if image is None else {"type": "image", "image": image}
    reply = Completion([Message("assistant", [part], train=True)])
    return replace(prompt, completions=[reply], kind="demonstration", label=1.0, margin=0.0)


def preferred(row: Row) -> list[tuple[int, int]]:
    """(better, worse) completions of a row, by number. Completions that are the same after truncation are no pair of a ranking."""
    if row.kind not in COMPARABLE:
        return []
    if row.kind == "ranking_all":
        ids = [b.ids for b in row.tokens.branches]
        every = [(i, j) for i in range(len(ids)) for j in range(len(ids))]
        return [(i, j) for i, j in every if row.scores[i] > row.scores[j] and ids[i] != ids[j]]
    last = len(row.tokens.branches) - 1
    return [] if row.label == 0.5 else [(0, last) if row.label > 0.5 else (last, 0)]


def _read(batch: Batch, of: Sequence[int], objective: Objective | None = None, rewards: bool = False, view: str = "") -> Reading:
    """What is read of a scored batch, whose edges belong to the rows `of` (-1: a filler). Without an objective: log-probs alone."""
    out = Reading({"tokens": _by_row(batch.lengths, of)})
    if "logp" in batch.scores["policy"]:
        out.tables["policy"] = _by_row(batch.logp(), of)
    if "error" in batch.scores["policy"]:  # pictures
        of_draws = [of[edge] for edge in batch.token_edge.tolist()]
        for scorer in ("policy", "reference"):
            if "token_logp" in batch.scores.get(scorer, {}):
                out.tables[f"{scorer}_draws"] = _by_row(batch.scores[scorer]["token_logp"], of_draws)
    if objective is None:
        return out
    if "logp" in batch.scores.get("reference", {}):
        out.tables["reference"] = _by_row(batch.logp("reference"), of)
    if rewards:
        out.tables["rewards"] = _by_row(objective.rewards(batch), of)
    if objective.view != view or objective.stepwise:
        return out
    row = torch.tensor(of, dtype=torch.long)
    for term in objective(batch).terms:
        units = term.batch or batch
        if term.unit == "token":
            view_of = units.demonstrations or units.pairs
            edges = units.token_edge[units.tokens_of(view_of.chosen if view_of is units.pairs else view_of.edge)]
        elif term.unit == "prompt":
            edges = units.ranking.edge[units.ranking.best]
        else:
            edges = units.pairs.chosen if term.unit == "pair" else units.unary.edge
        columns = row[edges.cpu()].tolist(), term.values.cpu().double().tolist(), unit_weight(batch, term).cpu().double().tolist()
        out.units[term.name] = term.weight, list(zip(*columns, strict=True))
    return out


def _by_row(values: torch.Tensor, of: Sequence[int]) -> Table:
    """row -> the values of its edges, in order (mismatched replies come after the row's own)."""
    out: Table = {}
    for row, value in zip(of, values.cpu().double().tolist(), strict=True):
        if row >= 0:
            out.setdefault(row, []).append(value)
    return out
