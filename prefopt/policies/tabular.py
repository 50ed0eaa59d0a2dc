"""The bandit world's policy: a table of logits. Exact, so optima can be compared with closed forms."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.config.schema import SamplerConfig
from prefopt.data import bandit
from prefopt.data.batch import MicroBatch
from prefopt.data.records import BadRow, Example, Message
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.objectives.base import About
from prefopt.policies.asked import Asked, answer
from prefopt.policies.causal_lm import Reply
from prefopt.policies.locate import Located
from prefopt.policies.logprob import Head
from prefopt.policies.noise import share
from prefopt.policies.owned import consult


class Table(nn.Module):
    """One number for each prompt token x and reply token y."""

    layout, share = "rows", False  # how a micro-batch is computed

    def __init__(self, device: torch.device):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(bandit.reference_table(), device=device))
        self.pad = 0
        self.source = {"path": None, "where": "exact table", "revision": None, "fingerprint": None}

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def about(self) -> About:
        """What a module of the objective may know: the hidden state is which prompt it is."""
        return About(len(self.logits), 1)

    def tokenise(self, example: Example) -> Tokens:
        branches = []
        for completion in example.completions:
            place = bandit.parse(completion.text)
            if place is None:
                raise BadRow(f"'{completion.text}' is no reply of the bandit world; model=bandit needs data=bandit")
            branches.append(Branch([place[1]], [True], True))
        return Tokens(self.prompt_ids(example.prompt, False), branches, 0, [0] * len(branches))

    def prompt_ids(self, prompt: list[Message], chat: bool) -> list[int]:
        text = prompt[-1].text
        if not text.isdigit() or int(text) >= bandit.PROMPTS:
            raise BadRow(f"'{text}' is no prompt of the bandit world; its prompts are 0 to {bandit.PROMPTS - 1}")
        return [int(text)]

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"logits": self.logits.detach().cpu().contiguous()}, str(folder / "model.safetensors"))

    def restore(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        from safetensors.torch import load_file

        file = folder / "model.safetensors"
        try:
            self.load_state_dict(load_file(str(file)))
        except Exception as error:  # safetensors has an error type of its own, torch another for what is not there
            raise UserError(f"{file} is no table of the bandit world ({str(error).splitlines()[0]}); give a run of data=bandit") from error
        fingerprint = Located(str(folder), None, "").fingerprint()
        self.source = {**self.source, "path": str(folder), "where": f"table of {folder}", "fingerprint": fingerprint}


class Tabular(Table):
    """log pi(y | x) = log_softmax(logits[x])[y]. Starts at the world's reference policy. `forward` as that of a language model."""

    quantity = "token_logp"  # what `forward` returns

    def forward(self, micro: MicroBatch, asked: Asked | None = None) -> Tensor | dict[str, Any]:
        prompts = micro.input_ids[:, 0]
        made = self.logits.log_softmax(-1)[prompts, micro.input_ids[:, 1]]
        if asked is None:
            return made
        # A table is a linear head over prompts: the state is which prompt it is, and the words' weights are its columns.
        states = F.one_hot(prompts, len(self.logits)).to(self.logits.dtype)
        said = answer(asked, made, states, Head(self.logits.t()), states[:, None])
        return said | consult(self, micro, states, asked.given) if asked.module else said

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampler: SamplerConfig, seed: int, places: Sequence[int] | None = None) -> list[Reply]:
        if sampler.top_p < 1:
            raise UserError("model=bandit draws from its whole table; set sampler.top_p=1")
        table = self.logits.detach().cpu().double()
        below = (table / (sampler.temperature or 1.0)).softmax(-1).cumsum(-1).tolist()
        replies = []
        for place, (x,) in zip(range(len(prompts)) if places is None else places, prompts, strict=True):
            if sampler.temperature == 0:  # replies have one token, so however many beams search, they find this
                y = int(table[x].argmax())
            else:
                y = min(bisect(below[x], share("reply", seed, place)), len(below[x]) - 1)  # the last sum may be a little less than 1
            replies.append(Reply([y], True, f"{x}:{y}"))
        return replies
