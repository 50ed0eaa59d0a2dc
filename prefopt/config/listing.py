"""What `prefopt list` and `prefopt show` print. Imports neither torch nor Hydra."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from prefopt.config.catalogue import (
    GROUPS,
    LIST_OPTIONS,
    MODALITIES,
    NEEDS,
    VIEWS,
    KeyLine,
    ObjectiveInfo,
    algo_info,
    algo_settings,
    brings,
    chosen_groups,
    experiments,
    find,
    groups,
    header,
    modalities,
    papers,
    resolved_keys,
    summary,
)
from prefopt.config.docstring import doc_parts
from prefopt.config.schema import REQUIRED, ModelConfig
from prefopt.config.strength import latent_dims, per_mean
from prefopt.errors import UserError, nearest

WIDTH = 100
QUANTITIES = {
    "logp": "log-prob of each reply", "token_logp": "log-prob of each token", "reward": "reward of each reply",
    "divergence": "divergence of its distribution at each token, over the whole vocabulary", "states": "hidden states, live",
    "value": "soft value of the state at each token", "distance": "distance to the second teacher's distribution at each token",
    "hidden": "last hidden state at each token", "mask_reward": "weight of each token's log-ratio, from the objective's own module",
    "mask_kl": "weight of each token's divergence, from the objective's own module",
    "degree_logits": "logits of a reply's degree of damage, from the objective's own module",
}  # fmt: skip
# Labels of docstrings, with the headings under which `prefopt show` prints what they say.
SAID = {"Rewards": "Rewards (what margins and accuracy are made of)", "Ranges": "What it logs, and in what range",
        "When": "When to use it", "Limits": "What it cannot do"}
SYMBOLS = {
    "h": "h = (w-rw)-(l-rl)",
    "w": "w: log-prob of the chosen reply",
    "l": "l: log-prob of the rejected reply",
    "rw": "rw, rl: the same under the reference",
    "sw": "sw, sl: the same under the slow copy of the policy",
    "nw": "nw, nl: their token counts",
    "p": "p: soft label, 1 if the data has none",
    "m": "m: margin of the data, 0 if it has none",
    "y": "y: log-prob of a reply",
    "r": "r: the same under the reference",
    "n": "n: its token count",
    "d": "d: 1 if the reply is desirable",
    "z": "z: KL estimate",
    "t": "t: log-prob of one token",
    "o": "o: the same under the policy that sampled it",
    "s": "s: the same under the reference",
    "R": "R: reward of a reply",
    "a": "a: reward of the chosen reply",
    "b": "b: reward of the rejected reply",
    "G": "G: rewards of all replies to its prompt",
    "S": "S: (y, r, n, v) of each reply to a prompt, best first, v its score; x, q, k, u: the same of another one",
    "rank": "rank(i, S): place of reply i by y - r in hundredths of a nat, the largest first, equal ones in order",
    "win": "win_rate(i, S): mean over the others of sigmoid(v - u)",
    "mu": "mu: mean over the batch of (w-rw)/nw - (l-rl)/nl",
    "sd": "sd: its standard deviation",
    "W": "W, L: (t, s) of each token of the chosen and of the rejected reply",
    "DW": "DW, DL: divergence of the policy's distribution at each of these tokens, nats",
    "TW": "TW, TL: log-prob of each of these tokens under the teacher",
    "VW": "VW, VL: the teacher's soft value of the state before each of these tokens, nats",
    "DIST": "DIST: how far both teachers are apart at each token of the chosen reply: the sum of |p - p'|",
    "XS": "XS: (y, r, n) of each extra sequence of the pair, in the order in which they are listed",
    "X": "X: the same sequences, of each the (t, s) of its tokens",
    "Q": "Q: (c, g) of each reply or pair that this one is matched with in the sorted batch: its share and the gap",
    "zb": "zb: mean of y-r over the batch, at least 0",
    "mid": "mid: middle between the mean of y-r over desirable and over undesirable replies of the batch",
    "sg": "sg(x): x held constant in the gradient",
}


def list_command(argv: Sequence[str]) -> str:
    """`prefopt list [group] [--view VIEW] [--needs NEED] [--modality MODALITY]`."""
    options: dict[str, str] = {}
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        word = words.pop(0)
        key = word.removeprefix("--") if word.startswith("--") else "group"
        if key not in ("group", *LIST_OPTIONS):
            raise UserError(f"prefopt list has no option {word}{nearest(word, [f'--{option}' for option in LIST_OPTIONS])}")
        if key in options:
            raise UserError(f"prefopt list takes one {key}, not both {options[key]} and {word}")
        if word.startswith("--") and not words:
            raise UserError(f"{word} needs a value, such as {LIST_OPTIONS[key]}")
        options[key] = words.pop(0) if word.startswith("--") else word
    return list_text(**options)


def list_text(group: str | None = None, view: str | None = None, needs: str | None = None, modality: str | None = None) -> str:
    """Table of one group, or of all. Algorithms are grouped by what they read, and can be narrowed by `view`, `needs` (a word of NEEDS, or
    no-WORD) and `modality`."""
    if group is not None and group not in GROUPS:
        raise UserError(f"there is no group {group}{nearest(group, GROUPS)}")
    narrowed = view or needs or modality
    if narrowed and group not in (None, "algo"):
        raise UserError(f"--view, --needs and --modality choose among algorithms, not {group}; say prefopt list algo")
    if group is None and not narrowed:
        blocks = [[f"{g}  (prefopt train {g}=NAME)", *_names(g)] for g in GROUPS if groups()[g]]
        return "\n\n".join("\n".join(block) for block in blocks) + "\n\nprefopt show NAME tells more about one of them."
    if group not in (None, "algo"):
        return "\n".join(_names(group))
    infos = _narrowed([algo_info(slug) for slug in groups()["algo"]], view, needs, modality)
    titles = ("NAME", "ARXIV", "MODALITY", "WHAT IT IS")
    rows = [(i.slug or "", next(iter(papers(i.slug or "")), "-"), "any" if len(modalities(i)) > 1 else modalities(i)[0], _with_needs(i))
            for i in infos]
    widths = [max(map(len, column)) for column in list(zip(titles, *rows, strict=True))[:-1]]
    lines = table([titles], "  ", widths)
    for reads in dict.fromkeys([*VIEWS, *(i.view for i in infos)]):
        if chosen := [row for row, info in zip(rows, infos, strict=True) if info.view == reads]:
            lines += ["", f"{reads}: {VIEWS.get(reads, '')}", *table(chosen, "  ", widths)]
    return "\n".join(lines) if rows else "no method fits"


def _narrowed(infos: list[ObjectiveInfo], view: str | None, needs: str | None, modality: str | None) -> list[ObjectiveInfo]:
    if view:
        views = {info.view for info in infos}
        if view not in views:
            raise UserError(f"--view {view}: no method reads that{nearest(view, views)}")
        infos = [info for info in infos if info.view == view]
    if needs:
        word = needs.removeprefix("no-")
        if word not in NEEDS:
            raise UserError(f"--needs {needs} is not a need{nearest(word, NEEDS)}")
        infos = [info for info in infos if NEEDS[word](info) != needs.startswith("no-")]
    if modality:
        if modality not in MODALITIES:
            raise UserError(f"--modality {modality} is none of {', '.join(MODALITIES)}{nearest(modality, MODALITIES)}")
        infos = [info for info in infos if modality in modalities(info)]
    return infos


def _with_needs(info: ObjectiveInfo) -> str:
    words = [word for word, test in NEEDS.items() if test(info)]
    return f"{summary(info.slug or '')}. Needs: {', '.join(words)}" if words else summary(info.slug or "")


def _names(group: str) -> list[str]:
    if group == "algo":
        return table([(slug, summary(slug)) for slug in groups()[group]], "  ")
    return table([(name, next(iter(header(group, name)), "")) for name in groups()[group]], "  ")


def table(rows: Sequence[Sequence[str]], indent: str = "", widths: Sequence[int] | None = None) -> list[str]:
    """Aligned columns, of these `widths` if given; the last one is wrapped."""
    widths = widths or [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines: list[str] = []
    for row in rows:
        left = indent + "".join(cell.ljust(width + 2) for cell, width in zip(row, widths, strict=False))
        lines += _wrap(row[-1], left) if row[-1] else [left.rstrip()]
    return lines


def _wrap(text: str, first: str, rest: str | None = None) -> list[str]:
    rest = " " * len(first) if rest is None else rest
    options = {"initial_indent": first, "subsequent_indent": rest, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, **options) or [first.rstrip()]


def show_command(argv: Sequence[str]) -> str:
    """`prefopt show NAME [model=NAME] [model.resolution=N]`."""
    names = [word for word in argv if not word.startswith(("model=", "model."))] or [w for w in argv if w.startswith("model=")][:1]
    if len(names) != 1:
        raise UserError("prefopt show takes one name: prefopt show dpo")
    given = dict(word.split("=", 1) if "=" in word else (word, "") for word in argv if word != names[0])
    if other := [key for key in given if key not in ("model", "model.resolution")]:
        raise UserError(f"prefopt show takes model=NAME and model.resolution=N beside a name, not {other[0]}")
    return show_text(names[0], given.get("model"), given.get("model.resolution"))


def show_text(name: str, model: str | None = None, resolution: str | None = None) -> str:
    """All about a config: what it is, its keys with their comments, and the command that uses it. Of an algorithm also what a setting such
    as 5000/D is for a diffusion model (SD1.5, if none is named) at its own resolution, or another one."""
    rule = "\n\n" + "-" * 60 + "\n\n"
    found = find(name)
    if model is not None or resolution is not None:
        found = [item for item in found if item[0] == "algo"]
        if not found:
            raise UserError(f"{name} is no algorithm; a model is named beside one, to see its settings for that model")
    return rule.join("\n".join(_show_algo(n, model, resolution) if g == "algo" else _show_config(g, n)) for g, n in found)


def _per_mean_lines(slug: str, model: str | None, resolution: str | None) -> list[str]:
    """The numbers of settings such as 5000/D for a model; nothing where there are none and no model is named."""
    settings = {key: value for key, value in algo_settings(slug).items() if per_mean(value) is not None}
    if not settings and model is None and resolution is None:
        return []
    (_, name), *_ = find(f"model={model or 'sd15'}")
    keys = resolved_keys("model", name)
    if keys["kind"].value != "diffusion":
        raise UserError(f"model={name} makes no pictures, so it has no latent dims D; name a diffusion model, such as model=sdxl")
    side = resolution or keys["resolution"].value
    channels, factor = (int(part) for part in keys["latent"].value.strip("[]").split(","))
    if not side.isdigit() or int(side) < factor:
        raise UserError(f"model.resolution={side}: it must be a whole number of pixels, such as {keys['resolution'].value}")
    dims = latent_dims(ModelConfig(name=name, resolution=int(side), latent=[channels, factor]))
    lines = [f"  for model={name} at {side} pixels D is {dims:,}"]
    return lines + [f"    algo.{key}: {value} is {per_mean(value) / dims:.4g}" for key, value in settings.items()]


def needs_lines(info: ObjectiveInfo) -> list[str]:
    """What an objective asks of data, models and batches, a sentence each."""
    lines = [f"data: {VIEWS.get(info.view, info.view)}; optional columns it uses: {', '.join(info.columns) or 'none'}"]
    for scorer, quantities in info.quantities.items():
        read = ", ".join(f"{q} ({QUANTITIES[q]})" if q in QUANTITIES else q for q in quantities)
        lines.append(f"{scorer}: {read or 'no score of it is read: it decides where others are scored'}")
    if not info.needs_reference:
        lines.append("no reference model")
    if "divergence" in info.quantities.get("policy", ()):
        lines.append("divergence: {} against {}, gradients through the policy".format(*info.divergence_from))
    if info.extra:
        lines.append(f"extra sequences of each row: {', '.join(info.extra)} (scored by {' and '.join(info.extra_scorers)})")
    if info.coupling == "global":
        lines.append("coupling: the loss of one row depends on the scores of the whole batch, so rows are scored twice")
    if info.mismatched:
        lines.append("mismatched replies: each prompt is also scored with another row's reply")
    if info.min_batch > 1:
        lines.append(f"batch: at least {info.min_batch} rows")
    if info.proper_likelihood:
        lines.append("likelihood: log-probs of a normalised distribution, so it is refused on diffusion models")
    elif modalities(info) == ("diffusion",):
        lines.append("diffusion models only: it is about the denoising errors of pictures")
    elif len(modalities(info)) == 1:
        lines.append("language models only: it reads more of a text than its likelihood as a whole")
    if chosen := brings(info.slug):
        lines.append(f"brings along: {', '.join(f'{group}={name}' for group, name in chosen.items())} (prefopt show GROUP=NAME; the "
                     "command line can choose others)")
    return lines


def limit_text(pinned: dict[str, Any], then: str) -> str:
    return f"at {', '.join(f'{key} = {value}' for key, value in pinned.items())} the loss is {then}"


def use_line(info: ObjectiveInfo) -> str:
    """The command that trains with an objective on this machine."""
    small = "model=tiny-lm" if "llm" in modalities(info) else "model=tiny-diffusion data=tiny-pictures"
    return f"prefopt train algo={info.slug} {small}"


def symbols_text(info: ObjectiveInfo) -> str:
    """What the letters in its formula stand for."""
    used = {word for text in info.formula.values() for word in re.findall(r"[A-Za-z]+", text)} - set(info.fields)
    used |= {"w", "l", "rw"} & ({"w", "l", "rw"} if "h" in used else set())
    return "; ".join(text for symbol, text in SYMBOLS.items() if symbol in used)


def _show_algo(slug: str, model: str | None = None, resolution: str | None = None) -> list[str]:
    info = algo_info(slug)
    equations, prose, said = doc_parts(info.doc)
    own, of_class = summary(slug), info.doc.partition("\n")[0]
    lines = _wrap(of_class if own == info.summary else f"{own}.", f"{slug}: ", "  ")
    lines += ["", *_wrap(of_class, "  ", "  ")] if own != info.summary else []
    lines += ["", "Equation", *(part for line in equations for part in _wrap(line, "  ", "      "))]
    lines += ["", *_wrap(prose, "  ", "  ")] if prose else []
    lines += ["", *(f"Paper: https://arxiv.org/abs/{paper}" for paper in papers(slug)), f"Class: {info.target}"]
    lines += ["", "Loss, term by term"]
    lines += [part for term, text in info.formula.items() for part in _wrap(text, f"  {term} = ", "      ")]
    lines += _wrap(symbols_text(info), "  ", "  ") if info.formula else []
    for label, title in SAID.items():
        lines += ["", title, *_wrap(said[label], "  ", "  ")] if label in said else []
    lines += ["", "Defaults"]
    lines += [part for line in header("algo", slug) for part in _wrap(line, "  # ", "  # ")]
    settings = {key: line for key, line in resolved_keys("algo", slug).items() if key != "_target_"}
    lines += keys_text(settings, "  algo.") or ["  no hyper-parameters"]
    lines += _per_mean_lines(slug, model, resolution)
    lines += [f"  must hold: {rule}" for rule in info.require]
    lines += ["", "Needs", *(part for line in needs_lines(info) for part in _wrap(line, "  ", "    "))]
    if info.limits:
        lines += ["", "Special cases"]
        lines += [part for limit in info.limits for part in _wrap(limit_text(*limit), "  ", "      ")]
    lines += ["", "Use", f"  {use_line(info)}"]
    lines += [f"  prefopt train +experiment={name}" for name in experiments(slug)]
    numbers = {key: value for key, value in algo_settings(slug).items() if type(value) is float and value > 0}
    for key, value in list(numbers.items())[:1]:
        lines.append(f"  prefopt train -m algo={slug} algo.{key}={value / 2:g},{value:g},{value * 2:g}")
    return lines


def _show_config(group: str, name: str) -> list[str]:
    lines = [f"{group}={name}", *(part for line in header(group, name) for part in _wrap(line, "  "))]
    if chosen := chosen_groups(group, name):
        lines += ["", "Chooses", *_wrap("  ".join(f"{key}={value}" for key, value in chosen.items()), "  ")]
    keys = resolved_keys(group, name)
    is_global = group in ("adapter", "transforms", "stages", "experiment", "sweep", "debug")
    lines += ["", "Keys", *keys_text(keys, "  " if is_global else f"  {group}.")]
    other = {"model": "data", "data": "model"}.get(group)
    extra = f" {other}={name}" if other and name in groups()[other] else ""
    extra += "".join(f" {group}.{key}=..." for key, line in keys.items() if line.value == REQUIRED)
    command = "prefopt train -m" if group == "sweep" else "prefopt train"
    return [*lines, "", "Use", f"  {command} {group}={name}{extra}"]


def keys_text(keys: dict[str, KeyLine], prefix: str) -> list[str]:
    """Dotted keys as one would write them on the command line, with their values and comments."""
    rows: list[tuple[str, str]] = []
    block = ("", "")  # its comment goes to its first key, or where that has one stands before it
    for key, line in keys.items():
        if not line.value and any(other.startswith(f"{key}.") for other in keys):
            block = (f"{prefix}{key}:", line.comment)
            continue
        rows += [block] if line.comment and block[1] else []
        rows.append((f"{prefix}{key}: {line.value}", line.comment or block[1]))
        block = ("", "")
    column = min(max((len(left) for left, _ in rows), default=0) + 2, 46)
    lines = []
    for left, comment in rows:
        head = left.ljust(column) if len(left) < column else f"{left}  "
        if len(head) > WIDTH - 30 and comment:
            lines += _wrap(left, "", "      ")
            head = " " * column
        lines += _wrap(comment, f"{head}# ", " " * column + "# ") if comment else [left]
    return lines
