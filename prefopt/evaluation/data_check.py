"""`prefopt data check`: a dataset as a model would see it, before anything is trained. Loads the tokenizer, never the weights."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.config.listing import table
from prefopt.config.mixtures import described
from prefopt.config.schema import DataCheckConfig, ModelConfig
from prefopt.data.dataset import Dataset, make_dataset
from prefopt.data.pictures import Framing
from prefopt.data.records import Example
from prefopt.data.sources import Split, load_data
from prefopt.data.tokenise import Branch, Tokeniser, Tokens
from prefopt.data.transforms import apply_transforms, transform_lines
from prefopt.errors import UserError
from prefopt.evaluation.contact_sheet import picture_lines, write_sheet

SHOWN = 20  # broken rows listed per split
PERCENTILES = (5, 50, 95)
MARKS = "⟦⟧"  # around trained tokens


@dataclass
class Measured:
    """Tokenises as a run would and notes the lengths before any limit."""

    tokeniser: Any
    prompts: list[int] = field(default_factory=list)
    replies: dict[str, list[int]] = field(default_factory=dict)
    wholes: list[int] = field(default_factory=list)
    longer: list[int] = field(default_factory=list)  # tokens of the first completion minus those of the last

    def __call__(self, example: Example) -> Tokens:
        if example.kind == "extra":  # an extra sequence of a pair: its replies are measured where they are the row's own
            return self.tokeniser(example)
        if not isinstance(self.tokeniser, Tokeniser):
            whole = tokens = self.tokeniser(example)
            self.note(example, whole)
            return tokens
        whole = self.tokeniser.whole(example)
        self.note(example, whole)  # even if the limits then refuse the row: they may be what has to change
        return self.tokeniser.limited(whole, example.kind)

    def note(self, example: Example, whole: Tokens) -> None:
        self.prompts.append(len(whole.prompt))
        for name, branch in zip(names(example), whole.branches, strict=True):
            self.replies.setdefault(name, []).append(len(branch.ids))
        self.wholes.append(whole.longest)
        if len(whole.branches) > 1:
            self.longer.append(len(whole.branches[0].ids) - len(whole.branches[-1].ids))

    @property
    def every_reply(self) -> list[int]:
        return list(itertools.chain(*self.replies.values()))


def check_text(cfg: DataCheckConfig) -> str:
    """The report. Broken rows are listed even where a run would stop at the first. Raises `UserError` where no run could start."""
    info = described(cfg.algo, cfg.trust.packages)
    if cfg.source.kind != "offline":  # replies will be sampled: the rows only have to have prompts
        info = replace(info, view="groups", columns=("weight", "label", "margin", "logp"))
    data = replace(cfg.data, on_bad_row="skip")
    if data.pictures:
        return _picture_text(cfg, data, info)
    tokeniser, show = _tokeniser(cfg, data)
    parts: list[tuple[Split, Dataset, Measured]] = []
    splits = load_data(data, cfg.trust)
    apply_transforms(splits, data, seed=0)
    for split in splits:
        measured = Measured(tokeniser)
        parts.append((split, make_dataset(split, data, measured, info.view, info.columns, False, 0, extra=info.extra), measured))
    name = cfg.algo.get("name", info.name)
    lines = [f"data={cfg.data.name} as algo={name} (view: {info.view}) and model={cfg.model.name} would see it"]
    for split, made, measured in parts:
        lines += ["", *_split_lines(split, made, measured, info.view, tokeniser)]
    lines += ["", *_overlap(parts)]
    lines += _broken(parts, cfg.data.on_bad_row == "stop")
    if isinstance(tokeniser, Tokeniser):
        lines += ["", *_suggestion(parts, tokeniser)]
    return "\n".join([*lines, "", *_example(parts[0][1], cfg.example, info.view, show, info.extra)])


def _picture_text(cfg: DataCheckConfig, data: Any, info: Any) -> str:
    """The report on rows with images. Of the model the tokenizer is loaded, to see which captions are too long for it."""
    splits = load_data(data, cfg.trust)
    apply_transforms(splits, data, seed=0)
    lines = [f"data={data.name} as algo={cfg.algo.get('name', info.name)} (view: {info.view}) and model={cfg.model.name} would see it"]
    for split in splits:
        lines += ["", *picture_lines(split, data, cfg.model, info.view, info.columns, percentiles)]
    seen = {e.prompt_text for e in splits[0].examples}
    both = sum(e.prompt_text in seen for e in splits[1].examples)
    lines += ["", f"{both} of {len(splits[1].examples)} eval rows have a caption that is in train as well"]
    lines.append(_long_captions(cfg.model, [example for split in splits for example in split.examples]))
    lines += _broken([(split,) for split in splits], cfg.data.on_bad_row == "stop")
    if cfg.sheet and splits[0].examples:
        lines += ["", write_sheet(cfg.sheet, splits[0].examples, Framing.of(data, cfg.model.resolution), names)]
    return "\n".join(lines)


def _long_captions(model: ModelConfig, examples: Sequence[Example]) -> str:
    """How many distinct captions have an end that no text encoder reads."""
    import torch

    from prefopt.policies.encoders import Encoders
    from prefopt.policies.pipeline import TINY
    from prefopt.policies.tiny_diffusion import tiny_diffusion_path
    from prefopt.training.plan_pictures import folder_of

    captions = list(dict.fromkeys(text for e in examples for text in (e.prompt_text, *(c.text for c in e.completions)) if text.strip()))
    try:
        if model.path is None and model.name in TINY and not tiny_diffusion_path(TINY[model.name]).is_dir():
            raise UserError("it is made by the first run that needs it")
        encoders = Encoders(folder_of(model), torch.float32, torch.device("cpu"))
        long = encoders.too_long(captions)
    except UserError as error:
        return f"captions too long for the text encoders of model={model.name} are not counted: {error}"
    told = f", such as {captions[long[0]][:60]!r}; what stands after is not read" if long else ""
    return f"{len(long)} of {len(captions)} captions are longer than the {encoders.limit} tokens that model={model.name} reads{told}"


def _tokeniser(cfg: DataCheckConfig, data: Any) -> tuple[Callable[[Example], Tokens], Callable[[list[int]], str]]:
    """(example -> tokens, ids -> text with special tokens)."""
    if cfg.model.kind == "tabular":
        import torch

        from prefopt.policies.tabular import Tabular

        return Tabular(torch.device("cpu")).tokenise, lambda ids: " ".join(map(str, ids))
    from prefopt.policies.loading import load_tokeniser

    tokeniser = load_tokeniser(cfg.model, data, cfg.trust)
    return tokeniser, lambda ids: tokeniser.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def names(example: Example) -> list[str]:
    """What each completion of a row is called."""
    count = len(example.completions)
    if example.kind == "pair":
        return ["chosen", "rejected"]
    if example.kind == "ranking":
        return ["best", *["middle"] * (count - 2), "worst"]
    if example.kind == "unary":
        return ["desirable" if c.desirable else "undesirable" for c in example.completions]
    return ["reply"] * count


def _split_lines(split: Split, made: Dataset, measured: Measured, view: str, tokeniser: Any) -> list[str]:
    left_out = made.stats["undesirable_left_out"]
    usable = f"{len(made.rows)} usable rows, {len(split.rejected)} broken"
    if split.no_preference:
        usable += f", {split.no_preference.total()} without a preference"
    rows = [(f"{split.name}: {usable}" + (f", {left_out} thumbs-down rows left out" if left_out else ""))]
    if not split.examples:
        return rows
    kinds = Counter(e.kind for e in split.examples)
    about = [(f"transform {name}", done) for name, done in transform_lines(split)]
    about += [("kinds", ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))]
    if unused := sorted({key for e in split.examples for key in e.meta}):
        about.append(("columns not used", ", ".join(unused)))
    if written := sum(any(c.logp is not None for c in e.completions) for e in split.examples):
        about.append(("log-probs of the writer", f"{written} of {len(split.examples)} rows"))
    about += [("no preference", f"{count}: {reason}") for reason, count in split.no_preference.most_common()]
    about += [
        ("truncated", f"{made.stats['truncated_prompts']} prompts, {made.stats['truncated_completions']} completions, "
                      f"{made.stats['cut_tokens']} tokens lost"),
    ]
    if made.stats.get("extra_sequences"):
        about.append(("extra sequences", f"{made.stats['extra_sequences']}, {made.stats['truncated_extra_sequences']} of them truncated"))
    about += [
        ("replies without end", f"{sum(not b.complete for r in made.rows for b in r.branches(view))} (a cut reply gets no invented end)"),
    ]
    if isinstance(tokeniser, Tokeniser):
        about.append(("double BOS", f"{_double_bos(split, made, tokeniser)} (must be 0)"))
    about += [("duplicates", _duplicates(split.examples)), ("ties", _ties(split.examples))]
    if measured.longer:
        share = 100 / len(measured.longer)
        about.append(("length", f"{names(made.examples[0] if made.examples else split.examples[0])[0]} is longer in "
                                f"{share * sum(d > 0 for d in measured.longer):.1f} % of pairs, shorter in "
                                f"{share * sum(d < 0 for d in measured.longer):.1f} %"))
    lengths = [("prompt", measured.prompts), *measured.replies.items(), ("longest in full", measured.wholes)]
    header = ("tokens, untruncated", *(f"{p} %" for p in PERCENTILES), "max")
    body = [(name, *map(str, percentiles(values))) for name, values in lengths if values]
    return [*rows, *table(about, "  "), *table([header, *body], "  ")]


def percentiles(values: Sequence[int]) -> list[int]:
    """5, 50, 95 % and the largest: values that occur, the smallest with at least that share at or below it."""
    ordered = sorted(values)
    return [*(at_share(ordered, p) for p in PERCENTILES), ordered[-1]]


def at_share(ordered: Sequence[int], percent: float) -> int:
    return ordered[max(-int(-len(ordered) * percent // 100), 1) - 1]


def _double_bos(split: Split, made: Dataset, tokeniser: Tokeniser) -> int:
    bos = tokeniser.tokenizer.bos_token_id
    refused = sum("two BOS tokens" in r.reason for r in split.rejected)
    return refused + sum(tokeniser.leads and (r.tokens.prompt + b.ids).count(bos) > 1 for r in made.rows for b in r.tokens.branches)


def _prompt(example: Example) -> str:
    return repr([m.plain() for m in example.prompt])


def _duplicates(examples: Sequence[Example]) -> str:
    prompts = [_prompt(e) for e in examples]
    rows = {(p, repr([[m.plain() for m in c.messages] for c in e.completions])) for p, e in zip(prompts, examples, strict=True)}
    return f"{len(examples) - len(rows)} rows repeat an earlier one, {len(prompts) - len(set(prompts))} have an earlier one's prompt"


def _ties(examples: Sequence[Example]) -> str:
    rankings = [e.completions for e in examples if e.kind == "ranking"]
    tied = sum(len({c.score for c in completions}) < len(completions) for completions in rankings)
    equal = sum(len({c.text for c in completions}) < len(completions) for completions in rankings)
    half = sum(e.kind == "pair" and e.label == 0.5 for e in examples)
    soft = sum(e.kind == "pair" and e.label not in (0.0, 1.0) for e in examples)
    return f"{tied} rankings with equal scores, {equal} with equal texts; {half} of {soft} soft labels are 0.5"


def _overlap(parts: Sequence[tuple[Split, Dataset, Measured]]) -> list[str]:
    (train, *_), (held_out, *_) = parts
    seen = {_prompt(e) for e in train.examples}
    both = sum(_prompt(e) in seen for e in held_out.examples)
    return [f"{both} of {len(held_out.examples)} eval rows have a prompt that is in train as well"]


def _broken(parts: Sequence[tuple[Split, ...]], stops: bool) -> list[str]:
    lines = []
    for split, *_ in parts:
        if split.rejected:
            count = len(split.rejected)
            lines += ["", f"{count} broken {split.name} rows" + (f", the first {SHOWN}" if count > SHOWN else "")]
            lines += [f"  {r.origin}: {r.reason}" for r in split.rejected[:SHOWN]]
    if lines and stops:
        lines.append("A run would stop at the first of them (data.on_bad_row=stop); data.on_bad_row=skip leaves them out and counts them.")
    elif lines:
        lines.append("A run leaves them out and counts them (data.on_bad_row=skip).")
    return lines


def _suggestion(parts: Sequence[tuple[Split, Dataset, Measured]], tokeniser: Tokeniser) -> list[str]:
    """Limits that leave 99 % of prompts and of completions whole, rounded up to 32 tokens; not above what there is."""
    context, found = tokeniser.context, []
    for values in ([n for *_, m in parts for n in m.prompts], [n for *_, m in parts for n in m.every_reply]):
        ordered = sorted(values) or [1]
        limit = min(-(-at_share(ordered, 99) // 32) * 32, ordered[-1], context - 1)
        found.append((limit, 100 * sum(n > limit for n in ordered) / len(ordered)))
    (prompt, long_prompts), (reply, long_replies) = found
    if not any(m.every_reply for *_, m in parts):  # rows that are only prompts
        return [f"suggested limit: data.max_prompt_tokens={prompt} ({long_prompts:.1f} % of prompts are longer; the model's context is "
                f"{context}, and sampler.max_new_tokens come on top)"]
    lines = [f"suggested limits: data.max_prompt_tokens={prompt} data.max_completion_tokens={reply}",
             f"  longer than that: {long_prompts:.1f} % of prompts, {long_replies:.1f} % of completions; the model's context is {context}"]
    if prompt + reply > context:
        lines.append(f"  together they pass the context: completions of long prompts will be cut at {context} tokens in all")
    return lines


def _example(
    made: Dataset, number: int, view: str, show: Callable[[list[int]], str], extra: Sequence[str] = ()
) -> list[str]:
    if not made.rows:
        return ["no usable row to show"]
    if not 0 <= number < len(made.rows):
        raise UserError(f"example={number}: there are {len(made.rows)} usable training rows; choose 0 to {len(made.rows) - 1}")
    row, example = made.rows[number], made.examples[number]
    told = f", label {example.label:g}" if example.kind == "pair" and example.label != 1 else ""
    told += f", weight {example.weight:g}" if example.weight != 1 else ""
    told += f", margin {example.margin:g}" if example.margin else ""
    told += f", stage {example.stage + 1}" if any(e.stage for e in made.examples) else ""
    lines = [f"example {number}: {example.origin} ({example.kind}{told}); trained tokens stand in {MARKS}",
             f"prompt, shared, {len(row.tokens.prompt)} tokens" + _lost(row.tokens.cut_prompt, "at its start"), show(row.tokens.prompt)]
    for i, (name, branch) in enumerate(zip(names(example), row.branches(view), strict=False)):
        cut = row.tokens.cut_completions[i]
        lines += [f"{name}, {len(branch.ids)} tokens, {branch.trained} trained" + _lost(cut, "at its end"), marked(branch, show)]
    for i, tokens in enumerate(row.extra):
        branch, name = tokens.branches[0], extra[i % len(extra)]
        pair = f" of pair {i // len(extra) + 1}" if len(row.extra) > len(extra) else ""
        lines += [f"extra sequence {name}{pair}: prompt, {len(tokens.prompt)} tokens" + _lost(tokens.cut_prompt, "at its start"),
                  show(tokens.prompt),
                  f"its reply, {len(branch.ids)} tokens, {branch.trained} trained" + _lost(tokens.cut_completions[0], "at its end"),
                  marked(branch, show)]
    return lines


def _lost(count: int, where: str) -> str:
    return f" ({count} more cut off {where})" if count else ""


def marked(branch: Branch, show: Callable[[list[int]], str]) -> str:
    """A completion's text with its trained runs in brackets."""
    out = ""
    for trained, run in itertools.groupby(zip(branch.ids, branch.mask, strict=True), key=lambda token: token[1]):
        text = show([token for token, _ in run])
        out += f"{MARKS[0]}{text}{MARKS[1]}" if trained else text
    return out
