"""The canonical example: a prompt with K completions and what is known about them. Every accepted row shape becomes one.

Shapes, told apart by the columns a row has (names can be mapped in `data.columns`):
  prompt + chosen + rejected       text, or chat messages; `label` may be the probability that chosen is better
  chosen + rejected                whole dialogues (messages, or Human/Assistant text) whose shared beginning is the prompt
  prompt + completions + scores    a ranking; `ranks` (1 is best) does as well; prefopt label needs neither
  prompt + completion + label      thumbs-up or thumbs-down
  prompt + completion, or messages a demonstration
  prompt                           a prompt for sampling
Optional per-row columns: weight, margin; chosen_score and rejected_score of a pair, which data transforms read; chosen_logp and
rejected_logp, the log-probs (nats, token sums) of a pair's replies under the policy that wrote them; rationale of a pair or a ranking: a
text that says why the best completion is better.
A completion may be a list of texts: the steps of its reasoning, each of which begins a line.
A completion may be an image: {"image": PATH}, where PATH is a file, or {"path": ..., "row": ..., "column": ...} in a parquet file. It may
have "ops", operations on its pixels (`prefopt.data.pictures`), and a "caption" of its own; otherwise the prompt is its caption. The column
user says whose preference it is, of images: a name, or the numbers of an embedding (`prefopt.data.users`). It becomes a part of the prompt.
A row that fits none raises `BadRow` with the reason.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class BadRow(ValueError):
    """Why a row cannot be used; the reader adds file and row number."""


class NoPreference(BadRow):
    """Why a row that is as its dataset means it has nothing to train on, such as a tie. It never stops a run."""


@dataclass
class Message:
    role: str
    content: list[dict[str, Any]]  # parts: {"type": "text", "text": ...}
    train: bool = False

    @property
    def text(self) -> str:
        return "".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def picture(self) -> dict[str, Any] | None:
        """The image part, if there is one."""
        return next((part for part in self.content if part["type"] == "image"), None)

    @property
    def user(self) -> Any:
        """Whose preference this is the prompt of: a name, or numbers; None where the data does not say."""
        return next((part["user"] for part in self.content if part["type"] == "user"), None)

    def plain(self) -> dict[str, str]:
        """The form chat templates take."""
        return {"role": self.role, "content": self.text}


@dataclass
class Completion:
    messages: list[Message]
    score: float | None = None
    desirable: bool | None = None
    logp: float | None = None  # under the policy that wrote it, if the data says so
    stepwise: bool = False  # the parts of its messages are steps of reasoning, and the objective asks for them

    @property
    def text(self) -> str:
        return "\n".join(m.text for m in self.messages)

    @property
    def picture(self) -> dict[str, Any] | None:
        """The image part, if this is an image; `text` is then its own caption, or empty."""
        return next((m.picture for m in self.messages if m.picture), None)

    def same_as(self, other: Completion) -> bool:
        """Whether both say, or are named as, the same."""
        return self.text == other.text and self.picture == other.picture


@dataclass
class Example:
    """K completions in order: for a pair chosen then rejected, for a ranking best first."""

    prompt: list[Message]
    completions: list[Completion]
    kind: str  # pair | ranking | unary | demonstration | prompt
    label: float = 1.0  # pair: probability that the first completion is the better one
    weight: float = 1.0
    margin: float = 0.0
    chat: bool = True  # False: the row was bare text, not messages
    origin: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    rationale: str = ""  # why the first completion is the better one, if the data says so
    stage: int = 0  # stages are trained on in order; set by the transform `curriculum`
    bare: list[Message] | None = None  # the prompt as the data has it, where a transform added something that only the policy shall see

    @property
    def prompt_text(self) -> str:
        """The prompt as rewards, judges and comparisons know it."""
        return "\n".join(m.text for m in (self.bare or self.prompt))

    def told(self, user: Any) -> Example:
        """The example as the preference of this user (a name, or numbers)."""
        *earlier, last = self.prompt
        content = [part for part in last.content if part["type"] != "user"]
        return replace(self, prompt=[*earlier, replace(last, content=[*content, {"type": "user", "user": user}])])


def parse_row(row: dict[str, Any], columns: dict[str, str | None], origin: str = "", unscored: bool = False) -> Example:
    """The example in a row. Raises `BadRow`. Columns that no shape uses are kept in `meta`.

    `unscored`: the completions are about to be scored, so a ranking may have no scores (then they stay None), or equal ones.
    """
    named = {key: name for key, name in columns.items() if name is not None}
    value = {key: row[name] for key, name in named.items() if row.get(name) is not None}
    meta = {k: v for k, v in row.items() if k not in named.values()}
    has = value.__contains__
    if has("chosen") or has("rejected"):
        for side in ("chosen", "rejected"):
            if not has(side):
                raise BadRow(f"there is no '{named.get(side, side)}'")
        example = _pair(value)
    elif has("completions"):
        example = _ranking(value, unscored)
    elif has("completion"):
        example = _single(value)
    elif has("messages"):
        messages = _messages(value["messages"], "messages")
        example = Example(*_split_last(messages), kind="demonstration")
    elif has("prompt"):
        prompt, chat = _prompt(value["prompt"])
        example = Example(prompt, [], kind="prompt", chat=chat)
    else:
        have = ", ".join(sorted(row)) or "no columns"
        raise BadRow(f"none of the columns prompt, chosen, completion, completions, messages is there (it has: {have})")
    example.weight = _number(value.get("weight", 1.0), "weight", low=0.0)
    example.margin = _number(value.get("margin", 0.0), "margin")
    if len(example.completions) > 1:
        example.rationale = _rationale(value.get("rationale", ""))
    if has("user") and (example.kind == "prompt" or example.completions[0].picture):
        example = example.told(value["user"])
    elif has("user"):
        meta[named["user"]] = value["user"]
    example.origin, example.meta = origin, meta
    for completion in example.completions:
        for message in completion.messages:
            message.train = message.role == "assistant"
        if not all(m.text.strip() or m.picture for m in completion.messages if m.train):
            raise BadRow("a completion is empty")
    return example


def _pair(value: dict[str, Any]) -> Example:
    chat = True
    sides = []
    pictures = _pictures([value["chosen"], value["rejected"]])
    for key in ("chosen", "rejected") if not pictures else ():
        raw = value[key]
        if isinstance(raw, str):
            dialogue = None if "prompt" in value else parse_dialogue(raw)
            if dialogue is None and "prompt" not in value:
                raise BadRow(f"'{key}' is bare text and there is no prompt column: where the prompt ends cannot be known")
            sides.append(dialogue or [_message("assistant", raw)])
        else:
            sides.append(_steps(raw) or _messages(raw, key))
    if pictures:
        prompt, chat, sides = _caption(value), False, pictures
    elif all(side[0].role == "assistant" for side in sides) and "prompt" in value:
        prompt, chat = _prompt(value["prompt"])
        if any(side[-1].role != "assistant" for side in sides):
            raise BadRow("a dialogue does not end with an assistant's turn")
    else:
        prompt, sides = _shared_prompt(sides)
    if pictures and sides[0][0].content == sides[1][0].content:
        raise BadRow("chosen and rejected are the same image")
    if not pictures and [m.plain() for m in sides[0]] == [m.plain() for m in sides[1]]:
        raise BadRow("chosen and rejected are the same text")
    label = _number(value.get("label", 1.0), "label", low=0.0, high=1.0)
    scores = [_number(value[key], key) if key in value else None for key in ("chosen_score", "rejected_score")]
    logps = [_number(value[key], key, high=0.0) if key in value else None for key in ("chosen_logp", "rejected_logp")]
    if (logps[0] is None) != (logps[1] is None):
        raise BadRow("it has the log-prob of one reply and not of the other; give both (data.columns.chosen_logp, rejected_logp), or none")
    completions = [Completion(side, score, logp=logp) for side, score, logp in zip(sides, scores, logps, strict=True)]
    return Example(prompt, completions, kind="pair", label=label, chat=chat)


def _shared_prompt(sides: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Splits whole dialogues at the first assistant turn in which they differ."""
    a, b = sides
    shared = 0
    while shared < min(len(a), len(b)) and a[shared].plain() == b[shared].plain():
        shared += 1
    if shared == len(a) == len(b):
        raise BadRow("chosen and rejected are the same text")
    if shared == min(len(a), len(b)):
        raise BadRow("one dialogue ends where the other goes on: they have no two completions to compare")
    if shared == 0:
        raise BadRow("chosen and rejected share no beginning, so there is no prompt")
    if a[shared].role != "assistant" or b[shared].role != "assistant":
        raise BadRow("chosen and rejected part at a user's turn, not at a reply")
    if a[-1].role != "assistant" or b[-1].role != "assistant":
        raise BadRow("a dialogue does not end with an assistant's turn")
    return a[:shared], [a[shared:], b[shared:]]


def _ranking(value: dict[str, Any], unscored: bool) -> Example:
    if "prompt" not in value:
        raise BadRow("'completions' needs a prompt")
    raw = value["completions"]
    if not isinstance(raw, (list, tuple)) or len(raw) < 2:
        raise BadRow("'completions' is not a list of two or more")
    pictures = _pictures(raw)
    prompt, chat = (_caption(value), False) if pictures else _prompt(value["prompt"])
    key = "scores" if "scores" in value else "ranks"
    marks = value.get(key)
    replies = pictures or [_completion_messages(c) for c in raw]
    if marks is None and unscored:
        return Example(prompt, [Completion(c) for c in replies], kind="ranking", chat=chat)
    if marks is None:
        raise BadRow("'completions' needs 'scores' or 'ranks' (prefopt label writes scores)")
    if not isinstance(marks, (list, tuple)) or len(marks) != len(raw):
        raise BadRow(f"there are {len(raw)} completions but {len(marks) if hasattr(marks, '__len__') else 'no list of'} {key}")
    scores = [_number(m, key) * (1 if key == "scores" else -1) for m in marks]
    completions = [Completion(c, score=s) for c, s in zip(replies, scores, strict=True)]
    completions.sort(key=lambda c: -c.score)
    if completions[0].score == completions[-1].score and not unscored:
        raise BadRow("all completions have the same score")
    return Example(prompt, completions, kind="ranking", chat=chat)


def _single(value: dict[str, Any]) -> Example:
    if "prompt" not in value:
        raise BadRow("'completion' needs a prompt")
    pictures = _pictures([value["completion"]])
    prompt, chat = (_caption(value), False) if pictures else _prompt(value["prompt"])
    completion = Completion(pictures[0] if pictures else _completion_messages(value["completion"]))
    if "label" not in value:
        return Example(prompt, [completion], kind="demonstration", chat=chat)
    label = value["label"]
    if label not in (0, 1, True, False):
        raise BadRow(f"label is {label!r}; for a single completion it is true or false")
    completion.desirable = bool(label)
    return Example(prompt, [completion], kind="unary", chat=chat)


def is_picture(raw: Any) -> bool:
    """Whether a row's side is an image: {"image": ...}, or a message with an image part."""
    if isinstance(raw, (list, tuple)) and len(raw) == 1:
        raw = raw[0]
    if not isinstance(raw, dict):
        return False
    parts = raw.get("content")
    return "image" in raw or isinstance(parts, (list, tuple)) and any(isinstance(p, dict) and p.get("type") == "image" for p in parts)


def _pictures(sides: list[Any]) -> list[list[Message]]:
    """The messages of sides that are images; none where they are not."""
    if not any(map(is_picture, sides)):
        return []
    if not all(map(is_picture, sides)):
        raise BadRow("some completions of the row are images and some are not")
    return [[Message("assistant", _picture(side))] for side in sides]


def _picture(side: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of an image: its own caption if it has one, and the image. `path` says where it is, or `image` holds it."""
    if isinstance(side, (list, tuple)):
        side = side[0]
    if "content" in side:
        if side.get("role") != "assistant":
            raise BadRow(f"an image stands in a message of the role {side.get('role')!r}, not of the assistant")
        images = [part for part in side["content"] if part.get("type") == "image"]
        said = "".join(str(part.get("text", "")) for part in side["content"] if part.get("type") == "text")
        if len(images) != 1:
            raise BadRow(f"a completion has {len(images)} images; it must be one")
        side = {"image": images[0], **({"caption": said} if said else {})}
    if unknown := sorted(side.keys() - {"image", "caption", "ops"}):
        raise BadRow(f"an image side has '{unknown[0]}', which nothing reads (known: image, caption, ops)")
    image, caption, ops = side["image"], side.get("caption"), side.get("ops")
    if isinstance(image, dict):
        where = {k: v for k, v in image.items() if k in ("path", "row", "column", "index", "image") and v is not None}
        ops = image.get("ops") if ops is None else ops
    else:
        where = {"path": str(image)} if isinstance(image, (str, Path)) else {"image": image}
    if isinstance(where.get("path"), str) == hasattr(where.get("image"), "size"):
        raise BadRow(f"an image is {str(image)[:40]!r}, not a path")
    if ops is not None and (not isinstance(ops, (list, tuple)) or not all(isinstance(op, str) for op in ops)):
        raise BadRow(f"the ops of an image are {str(ops)[:40]!r}, not a list of texts")
    part = {"type": "image", **where, **({"ops": list(ops)} if ops else {})}
    if caption is None:
        return [part]
    if not isinstance(caption, str) or not caption.strip():
        raise BadRow("an image's own caption is empty or no text")
    return [{"type": "text", "text": caption}, part]


def _caption(value: dict[str, Any]) -> list[Message]:
    """The prompt of images: a text, or one user's message."""
    raw = value.get("prompt")
    if raw is None:
        raise BadRow("an image needs a caption: there is no prompt")
    if not isinstance(raw, str):
        messages = _messages(raw, "prompt")
        if len(messages) != 1 or messages[0].role != "user":
            raise BadRow("the prompt of an image is a text or one user's message")
        raw = messages[0].text
    if not raw.strip():
        raise BadRow("the caption is empty")
    return [_message("user", raw)]


def _rationale(raw: Any) -> str:
    if not isinstance(raw, str):
        raise BadRow(f"'rationale' is {str(raw)[:40]!r}, not a text")
    return raw.strip()


def _prompt(raw: Any) -> tuple[list[Message], bool]:
    if isinstance(raw, str):
        messages = parse_dialogue(raw)
        if messages is None:
            return [_message("user", raw)], False
        if messages[-1].role == "assistant" and not messages[-1].text:
            messages.pop()  # "...\n\nAssistant:" only asks for a reply
    else:
        messages = _messages(raw, "prompt")
    if messages[-1].role == "assistant":
        raise BadRow("the prompt ends with an assistant's turn")
    return messages, True


def _completion_messages(raw: Any) -> list[Message]:
    if isinstance(raw, str):
        return [_message("assistant", raw)]
    messages = _steps(raw) or _messages(raw, "completion")
    if messages[0].role != "assistant" or messages[-1].role != "assistant":
        raise BadRow("a completion must begin and end with an assistant's turn")
    return messages


def _steps(raw: Any) -> list[Message]:
    """A reply that is given as a list of texts: one message with a part for each. Nothing for all else."""
    if not isinstance(raw, (list, tuple)) or not raw or not all(isinstance(step, str) and step.strip() for step in raw):
        return []
    return [_message("assistant", [{"type": "text", "text": f"{step}\n"} for step in raw[:-1]] + [{"type": "text", "text": raw[-1]}])]


def _messages(raw: Any, what: str) -> list[Message]:
    if isinstance(raw, dict):
        raw = [raw]
    if not isinstance(raw, (list, tuple)) or not raw:
        raise BadRow(f"'{what}' is neither text nor a list of messages")
    messages = []
    for item in raw:
        if not isinstance(item, dict) or "role" not in item or "content" not in item:
            raise BadRow(f"'{what}' holds something that is no message with role and content")
        messages.append(_message(item["role"], item["content"]))
    return messages


def _message(role: Any, content: Any) -> Message:
    if role not in ROLES:
        raise BadRow(f"unknown role {role!r} (roles are {', '.join(ROLES)})")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not all(isinstance(p, dict) and "type" in p for p in content):
        raise BadRow("a message's content is neither text nor a list of parts")
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"a message part of type {part['type']!r}: only text parts are supported by language models here")
    return Message(role, [dict(p) for p in content])


def _split_last(messages: list[Message]) -> tuple[list[Message], list[Completion]]:
    first = next((i for i, m in enumerate(messages) if m.role == "assistant"), None)
    if first in (None, 0) or messages[-1].role != "assistant":
        raise BadRow("a demonstration needs a user's turn and must end with an assistant's")
    return messages[:first], [Completion(messages[first:])]


def _number(raw: Any, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"'{what}' is {str(raw)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise BadRow(f"'{what}' is {number}")
    if not low <= number <= high:
        raise BadRow(f"'{what}' is {number}, outside [{low:g}, {high:g}]")
    return number


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def parse_dialogue(text: str) -> list[Message] | None:
    """Messages of an HH-style string ("\\n\\nHuman: ...\\n\\nAssistant: ..."); None if it is no such string."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return None
    turns = [(parts[i], parts[i + 1].strip()) for i in range(1, len(parts) - 1, 2)]
    return [_message("user" if who == "Human" else "assistant", said) for who, said in turns]
