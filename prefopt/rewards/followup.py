"""FLR: how likely praise is, and how unlikely complaints, as a user's next turn after a reply (arXiv 2409.13948)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from prefopt.config.schema import DataConfig, LoraConfig, ModelConfig, TrustConfig
from prefopt.data.batch import Row, build, split_step
from prefopt.data.records import BadRow, Example, Message
from prefopt.data.tokenise import Branch, Tokeniser, Tokens
from prefopt.errors import UserError
from prefopt.policies.causal_lm import CausalLM
from prefopt.policies.start import model_settings, policy_folder, started
from prefopt.rewards.followups import STATEMENTS


class FollowupLikelihood:
    """r(x, y) = mean over categories of [mean over F+ of l(f) - mean over F- of l(f)]; l(f) = mean over the tokens of f of log p(f_t | ..).

    p is a language model, f a statement as the user's turn after the dialogue of prompt x and reply y; F+ and F- are praise and complaints
    (`statements`: category -> both). In nats per token; 0 where both sides are the same. The model is the one at `path` (a run, a folder, a
    hub id), or `model` without one. A dialogue that leaves no room in its context loses its start, counted in `cut`.

    The tokens scored are those that hold a letter of the statement, each by the distribution that precedes it. The code published with the
    paper takes raw logits, all of one position, and a span that includes the template's marks; there is no option for that.
    """

    def __init__(self, path: str | None, trust: TrustConfig, device: torch.device, precision: str, model: ModelConfig | None = None,
                 statements: Mapping[str, tuple[Sequence[str], Sequence[str]]] = STATEMENTS):
        cfg = replace(scorer_config(path) if path else model, dropout=0.0, gradient_checkpointing=False)
        rendering = DataConfig(name="followup", source="files", render="chat")
        self.model = CausalLM(cfg, rendering, trust, device, precision, seed=0).eval().requires_grad_(False)
        self.tokeniser, self.budget = self.model.tokeniser, cfg.micro_batch_tokens
        if self.tokeniser.template is None:
            self.tokeniser = Tokeniser(self.model.tokenizer, rendering, self.tokeniser.context, "plain")
        self.statements, self.cut, self.said = statements, 0, 0
        self.source = {**self.model.source, "path": path}
        self.flat = [f for sides in statements.values() for side in sides for f in side]
        ids = self.model.tokenizer(self.flat, add_special_tokens=False)["input_ids"]
        unknown = fmean(i == self.model.tokenizer.unk_token_id for sentence in ids for i in sentence)
        if unknown > 0.25:
            raise UserError(f"reward=flr: {100 * unknown:.0f} % of the follow-ups are unknown words to the tokenizer of {cfg.name} ("
                            "tiny-lm knows the words of data=tiny-feedback only); give a model that speaks English: reward.path=...")

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> list[float]:
        rows, of = [], []
        for number, example in enumerate(examples):
            tokens = self.tokens(example)
            # Where a prompt is computed for each of its follow-ups again, a few at a time keep within the budget.
            length = len(tokens.prompt) + max(len(b.ids) for b in tokens.branches)
            size = len(tokens.branches) if self.model.share else max(1, self.budget // length)
            for start in range(0, len(tokens.branches), size):
                rows.append(Row(Tokens(tokens.prompt, tokens.branches[start : start + size]), "pair"))
                of.append(number)
        means: list[list[float]] = [[] for _ in rows]
        for chosen in split_step(rows, range(len(rows)), "pairs", self.budget, 1, self.model.layout, self.model.share)[0]:
            micro = build(rows, chosen, "pairs", self.model.pad).to(self.model.device)
            layout, logp = micro.layout, self.model(micro)
            values = (logp.new_zeros(len(layout.lengths)).index_add(0, layout.token_edge, logp) / layout.lengths).tolist()
            for row in chosen:
                count = len(rows[row].tokens.branches)
                means[row], values = values[:count], values[count:]
        self._say_cut()
        whole: list[list[float]] = [[] for _ in examples]
        for number, values in zip(of, means, strict=True):
            whole[number] += values
        return [self.reward(values) for values in whole]

    def reward(self, likelihoods: Sequence[float]) -> float:
        """r of l(f) of each statement, in the order of `flat`."""
        left, gaps = iter(likelihoods), []
        for praise, complaints in self.statements.values():
            plus, minus = (fmean(next(left) for _ in side) for side in (praise, complaints))
            gaps.append(plus - minus)
        return fmean(gaps)

    def tokens(self, example: Example) -> Tokens:
        """The dialogue, and a branch for each statement as the user's next turn, up to its last letter."""
        said = [*(example.bare or example.prompt), *example.completions[0].messages]
        try:
            found = [self._sequence(said, statement) for statement in self.flat]
        except BadRow as reason:
            raise UserError(f"{example.origin}: reward=flr cannot ask what the user says next: {reason}") from reason
        first = found[0][0]
        shared = min(start for _, start in found)
        while any(ids[:shared] != first[:shared] for ids, _ in found):
            shared -= 1
        prompt = first[:shared]
        branches = [Branch(ids[shared:], [place >= start for place in range(shared, len(ids))], False) for ids, start in found]
        limit = self.tokeniser.context - max(len(b.ids) for b in branches)
        if len(prompt) > limit:
            keep = int(self.tokeniser.leads)
            prompt = prompt[:keep] + prompt[len(prompt) - (limit - keep) :]
            self.cut += 1
        return Tokens(prompt, branches)

    def _sequence(self, said: list[Message], statement: str) -> tuple[list[int], int]:
        """(ids of the dialogue with this next turn, up to its last letter; the first of them that holds a letter of the statement)."""
        text = self.tokeniser._apply([*said, Message("user", [{"type": "text", "text": statement}])], False)
        begin = text.rfind(statement)
        if begin < 0:
            raise BadRow(f"the chat template does not show '{statement}' as it stands")
        ids, offsets = self.tokeniser._encode(text)
        inside = [place for place, (start, end) in enumerate(offsets) if start < begin + len(statement) and end > begin]
        return ids[: inside[-1] + 1], inside[0]

    def _say_cut(self) -> None:
        """Whenever their number has doubled."""
        if self.cut and self.cut >= 2 * self.said:
            self.said = self.cut
            print(f"reward: {self.cut} dialogues so far were too long for the model that judges; it read them without their start",
                  file=sys.stderr)


def scorer_config(path: str) -> ModelConfig:
    """How to load the language model at `path`: with the settings of its run, where it has one."""
    if not Path(path).expanduser().is_dir() and not path.startswith((".", "/", "~")):
        return ModelConfig(name=Path(path).name, path=path)
    folder = policy_folder(path, "reward.path")
    settings = model_settings(folder)
    if not settings:
        return ModelConfig(name=folder.name, path=str(folder))
    try:
        cfg = ModelConfig(**{**settings, "lora": LoraConfig(**settings["lora"]), "start": str(folder)})
    except (TypeError, KeyError) as error:
        known = folder.parent / "config.yaml"
        raise UserError(f"reward.path={path}: {known} is no config of this version of prefopt ({error})") from error
    if cfg.kind == "tabular":
        raise UserError(f"reward.path={path} holds a table of the bandit world, which reads no texts; give a language model")
    return started(cfg, "reward.path")
