"""From an example to token ids: one rendering per completion, spans found by character offsets, one shared prompt.

Rules: exactly one BOS where the tokenizer uses one and none otherwise; an end-of-sequence token, trained on, if and only if the
reply is complete; a token belongs to the reply if it holds at least one of its bytes; nothing is cut without being counted.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.config.schema import DataConfig
from prefopt.data.records import BadRow, Completion, Example, Message
from prefopt.errors import UserError

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}{% else %}{{ '\\n\\nHuman: ' + m['content'] }}{% endif %}{% endfor %}"
    # No space here: it belongs to the reply, because tokenizers join it to the word that follows.
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

PROBE = "prefopt probe"  # a reply that no template has in itself


@dataclass
class Branch:
    """One completion: its tokens after the shared prompt, which of them are trained, and the reasoning step of each (None: one in all)."""

    ids: list[int]
    mask: list[bool]
    complete: bool  # ends with a trained end-of-sequence token
    steps: list[int] | None = None

    @property
    def trained(self) -> int:
        return sum(self.mask)


@dataclass
class Tokens:
    """A tokenised example: `prompt` ids shared by all branches. `cut` counts what truncation took. `frame` is the shape of its pictures, if
    it has any: other shapes cannot be computed along with them."""

    prompt: list[int]
    branches: list[Branch]
    cut_prompt: int = 0
    cut_completions: list[int] = field(default_factory=list)
    frame: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return len(self.prompt) + max((len(b.ids) for b in self.branches), default=0)


class Tokeniser:
    """A fast tokenizer with a chat template and the length limits of a data config.

    `context` is the model's longest sequence; `thinking` leaves a reply's thought open, in templates that know one.
    Raises `UserError` at construction if the tokenizer cannot serve.
    """

    def __init__(self, tokenizer: Any, cfg: DataConfig, context: int, chat_template: str | None = None, thinking: bool = False):
        self.tokenizer, self.cfg, self.context, self.thinking = tokenizer, cfg, context, thinking
        if not tokenizer.is_fast:
            raise UserError("the tokenizer is a slow one without character offsets; use a model with a fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token; replies could never be trained to end")
        own = tokenizer.chat_template
        self.template = _template(chat_template) or (own.get("default") if isinstance(own, dict) else own)
        probe = tokenizer("a")["input_ids"]
        # Only a tokenizer that adds its BOS by itself uses one: several define a bos_token they never write (Qwen, GPT-2).
        self.adds_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        self.leads = self.adds_bos  # whether BOS opens every text, once; ChatML files name <|im_start|> their bos_token
        self.ends = {tokenizer.eos_token_id}
        if self.template is not None:
            self._learn_template()

    def _learn_template(self) -> None:
        """Finds the special token with which the template ends an assistant's turn (such as Llama-3's <|eot_id|>)."""
        try:
            text = self._apply([Message("user", _text("a")), Message("assistant", _text(PROBE))], False)
            ids = self._encode(text)[0]
        except BadRow as error:
            raise UserError(f"{error}; set model.chat_template to one that takes a user's and an assistant's turn") from error
        bos = self.tokenizer.bos_token_id
        self.leads = bos is not None and ids[:1] == [bos] and ids.count(bos) == 1
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        after = self.tokenizer(text.rpartition(PROBE)[2], add_special_tokens=False)["input_ids"]
        self.ends |= set([i for i in after if i in special][:1])

    def digest(self) -> str:
        """sha256 of everything that decides which ids a text gets: vocabulary, template, limits."""
        h = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        h.update(repr((self.template, self.thinking, self.adds_bos, sorted(self.ends), self.context, self.cfg.render,
                       self.cfg.max_prompt_tokens, self.cfg.max_completion_tokens, self.cfg.on_long_prompt)).encode())
        return h.hexdigest()

    def templated(self, chat: bool) -> bool:
        """Whether a row goes through the chat template; `chat` says that it holds messages."""
        if self.cfg.render == "text":
            if chat:
                raise BadRow("data.render=text, but the row holds chat messages; use data.render=chat")
            return False
        if self.template is None and (self.cfg.render == "chat" or chat):
            raise UserError("the tokenizer has no chat template and the data is chat; set model.chat_template=plain or a Jinja file")
        return self.template is not None

    def __call__(self, example: Example) -> Tokens:
        """Tokenises an example. Raises `BadRow` where no faithful tokenisation exists, or none within the limits."""
        return self.limited(self.whole(example), example.kind)

    def whole(self, example: Example) -> Tokens:
        """The example's tokens without regard to any limit."""
        chat = self.templated(example.chat)
        head = self._head(example.prompt, chat)
        if not example.completions:
            return Tokens(self._encode(head)[0], [])
        rendered = [self._render(example.prompt, head, c, chat) for c in example.completions]
        prompts = [ids[:split] for ids, _, split, _ in rendered]
        shared = min(len(p) for p in prompts)
        while any(p[:shared] != prompts[0][:shared] for p in prompts):
            shared -= 1  # a token that straddles prompt and reply in one rendering only
        return Tokens(prompts[0][:shared], [Branch(ids[shared:], mask[shared:], True, steps and steps[shared:])
                                            for ids, mask, _, steps in rendered])

    def prompt_ids(self, prompt: list[Message], chat: bool) -> list[int]:
        """Ids to sample a reply from, rendered and limited as in training; `chat` says that the row holds messages.

        Never empty: without any token a text is begun after an end-of-sequence token, as in GPT-2's training data.
        """
        ids = self._encode(self._head(prompt, self.templated(chat)))[0]
        return self.limited(Tokens(ids, []), "prompt").prompt or [self.tokenizer.eos_token_id]

    def _head(self, prompt: list[Message], chat: bool) -> str:
        return self._apply(prompt, True) if chat else "\n".join(m.text for m in prompt)

    def _render(
        self, prompt: list[Message], head: str, completion: Completion, chat: bool
    ) -> tuple[list[int], list[bool], int, list[int] | None]:
        """(ids, trained mask, number of whole prompt tokens, step of each token) of prompt + completion; `head` is the prompt's text."""
        if not chat:
            full, spans = head + completion.text, [(len(head), len(head) + len(completion.text))]
        else:
            before, full, spans = list(prompt), "", []
            for message in completion.messages:
                if message.role == "assistant":
                    previous = self._apply(before, True) if full else head
                    if not previous.startswith(full):
                        raise BadRow(_no_prefix(full, previous) + _advice(before))
                else:
                    previous = full
                before.append(message)
                full = self._apply(before, False)
                # Templates may rewrite earlier turns (dropping old reasoning); then the spans found so far would be wrong.
                if not full.startswith(previous):
                    raise BadRow(_no_prefix(previous, full) + _advice(before))
                if message.train:
                    spans.append((len(previous), len(full)))
        ids, offsets = self._encode(full)
        start = len(head)
        starts, ends = [s for s, _ in offsets], [e for _, e in offsets]
        mask = [False] * len(ids)
        for low, high in spans:  # a token is in a span if it holds one of its characters
            first, beyond = bisect_right(ends, low), bisect_left(starts, high)
            mask[first:beyond] = [True] * (beyond - first)
        split = bisect_right(ends, start)
        if split == len(ids) or not any(mask):
            raise BadRow("the completion has no tokens")
        steps = _steps(completion, full, spans, ends)
        ids, mask, split = self._finish(ids, mask, split)
        return ids, mask, split, steps and [*steps, steps[-1]][: len(ids)]

    def _finish(self, ids: list[int], mask: list[bool], split: int) -> tuple[list[int], list[bool], int]:
        """Ends each trained span at its end-of-turn token; template text after it (a newline) is context, not a target."""
        end = len(ids)
        i = end - 1
        while i >= split:
            if mask[i]:
                stop = i
                first = stop
                while first > split and mask[first - 1]:
                    first -= 1
                turn_end = next((j for j in range(stop, first - 1, -1) if ids[j] in self.ends), None)
                if turn_end is not None:
                    for j in range(turn_end + 1, stop + 1):
                        mask[j] = False
                i = first
            i -= 1
        last = max(j for j in range(len(ids)) if mask[j])
        ids, mask = ids[: last + 1], mask[: last + 1]
        if ids[-1] not in self.ends:
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, True]
        return ids, mask, split

    def limited(self, whole: Tokens, kind: str) -> Tokens:
        """Applies the length limits, counting what they take."""
        cfg, prompt = self.cfg, whole.prompt
        limit = min(cfg.max_prompt_tokens or self.context - 1, self.context - 1)
        out = Tokens(prompt, [])
        if len(prompt) > limit:
            if cfg.on_long_prompt == "stop":
                raise BadRow(f"the prompt has {len(prompt)} tokens, the limit is {limit}; data.on_long_prompt=keep_end drops its start")
            keep_bos = int(self.leads)
            out.prompt = prompt[:keep_bos] + prompt[len(prompt) - (limit - keep_bos):]
            out.cut_prompt = len(prompt) - limit
        room = min(cfg.max_completion_tokens or self.context, self.context - len(out.prompt))
        for number, branch in enumerate(whole.branches, 1):
            mask = branch.mask
            if not out.prompt:  # nothing precedes a reply's first token, so nothing predicts it
                mask = [False, *mask[1:]]
                if not any(mask):
                    raise BadRow("the prompt is empty and the completion has one token, which nothing predicts")
            if not any(mask[:room]):
                raise BadRow(f"nothing of completion {number} would be left within {room} tokens; raise data.max_completion_tokens")
            out.branches.append(Branch(branch.ids[:room], mask[:room], len(branch.ids) <= room, branch.steps and branch.steps[:room]))
            out.cut_completions.append(max(len(branch.ids) - room, 0))
        if kind in ("pair", "ranking") and len({tuple(b.ids) for b in out.branches}) == 1:
            what = "chosen and rejected" if kind == "pair" else "all completions"
            why = " after truncation" if any(out.cut_completions) else ""
            if self.tokenizer.unk_token_id in out.branches[0].ids:
                why = ": most words are unknown to this tokenizer (tiny-lm knows the words of data=tiny-feedback only; choose another)"
            raise BadRow(f"{what} are the same tokens{why}")
        return out

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        bos = self.tokenizer.bos_token_id
        if self.adds_bos and ids[:1] != [bos]:
            ids, offsets = [bos, *ids], [(0, 0), *offsets]
        if bos is not None and ids[:2] == [bos, bos]:
            raise BadRow("the rendered text begins with two BOS tokens; the chat template writes one too many")
        return ids, offsets

    def _apply(self, messages: list[Message], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [m.plain() for m in messages], chat_template=self.template, tokenize=False, add_generation_prompt=generate,
                enable_thinking=self.thinking,  # Qwen3 and SmolLM3 read it, other templates do not
            )
        except Exception as error:  # templates raise their own errors on roles or orders they do not know
            raise BadRow(f"the chat template refuses this conversation ({error}){_advice(messages)}") from error


def _steps(completion: Completion, full: str, spans: list[tuple[int, int]], ends: list[int]) -> list[int] | None:
    """The number of the step that each token is part of, the last one that begins before the token's end; None if they are not asked for.
    `spans` are where the trained messages stand in the text `full`. Raises `BadRow` where a step is not to be found there."""
    if not completion.stepwise:
        return None
    begins, at = [], 0
    for text in (part["text"].strip() for m in completion.messages if m.train for part in m.content):
        found = next((p for low, high in spans if (p := full.find(text, max(low, at), high)) >= 0), None)
        if found is None:
            raise BadRow(f"the chat template changes the text of a step ({text[:40]!r}), so its tokens cannot be told")
        begins.append(found)
        at = found + len(text)
    return [max(bisect_left(begins, end) - 1, 0) for end in ends]


def _advice(messages: list[Message]) -> str:
    """What to do about a system message where a template (Gemma's, Mistral's) has no place for one."""
    if not any(m.role == "system" for m in messages):
        return ""
    return "; it has a system message: put that text into the first user's message, or set model.chat_template to one that takes it"


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _template(setting: str | None) -> str | None:
    if setting is None:
        return None
    if setting == "plain":
        return PLAIN_TEMPLATE
    path = Path(setting).expanduser()
    if not path.is_file():
        raise UserError(f"model.chat_template={setting}: there is no such file; use a path to a Jinja file, 'plain', or null")
    return path.read_text(encoding="utf-8")


def _no_prefix(prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return (
        "the chat template renders the prompt differently once a reply follows, so the model would be trained on a prompt it never sees: "
        f"alone ...{prompt[max(at - 20, 0):at + 30]!r}, with reply ...{full[max(at - 20, 0):at + 30]!r}; set model.chat_template"
    )
