"""Published datasets whose rows have a shape of their own: for each a pure function from a source row to canonical rows.

A canonical row has the default column names (see `prefopt.data.records`). Columns that a function does not use stay in it and become
metadata. `NoPreference` marks a row that is as published but prefers nothing, such as a tie: it is counted apart from broken rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from prefopt.data.records import BadRow, NoPreference

Row = dict[str, Any]


def shp(row: Row) -> list[Row]:
    """stanfordnlp/SHP: a Reddit post and two comments; `labels` is 1 if A is preferred, 0 if B is."""
    first = _choice(row, "labels", (0, 1)) == 1
    return [_pair(row, "history", "human_ref_A", "human_ref_B", first, used=("labels",))]


def helpsteer2(row: Row) -> list[Row]:
    """nvidia/HelpSteer2, folder preference: strength -3 (response 1 much better) to 3 (response 2 much better); 0 is a tie."""
    strength = _choice(row, "preference_strength", range(-3, 4))
    if strength == 0:
        raise NoPreference("a tie: preference_strength is 0")
    made = _pair(row, "prompt", "response_1", "response_2", strength < 0)
    return [{**made, "prompt": _turns(made["prompt"])}]


def pku_better(row: Row) -> list[Row]:
    """PKU-Alignment/PKU-SafeRLHF by helpfulness: `better_response_id` is 0 or 1."""
    return [_pair(row, "prompt", "response_0", "response_1", _choice(row, "better_response_id", (0, 1)) == 0)]


def pku_safer(row: Row) -> list[Row]:
    """PKU-Alignment/PKU-SafeRLHF by harmlessness: `safer_response_id` is 0 or 1."""
    return [_pair(row, "prompt", "response_0", "response_1", _choice(row, "safer_response_id", (0, 1)) == 0)]


def nectar(row: Row) -> list[Row]:
    """berkeley-nest/Nectar: an HH-style prompt and up to seven `answers`, each with a `rank` (1 is best)."""
    answers = _list(row, "answers")
    return [_ranking(row, "prompt", [a.get("answer") for a in answers], "ranks", [a.get("rank") for a in answers], used=("answers",))]


def ultrafeedback(row: Row) -> list[Row]:
    """openbmb/UltraFeedback: up to four `completions`, scored here by the mean of their four aspect ratings (`fine-grained_score`).

    `overall_score` is left alone: it comes from a critique and was wrong for thousands of completions in the first release.
    """
    rated = [c for c in _list(row, "completions") if c.get("fine-grained_score") is not None]
    if len(rated) < 2:
        raise NoPreference("fewer than two of its completions have a score")
    scores = [c["fine-grained_score"] for c in rated]
    return [_ranking(row, "instruction", [c.get("response") for c in rated], "scores", scores, used=("completions",))]


# Chosen by `data.rows`. The names stand in prefopt.config.schema.CHOICES, too.
ROWS: dict[str, Callable[[Row], list[Row]]] = {
    "helpsteer2": helpsteer2, "nectar": nectar, "pku-better": pku_better, "pku-safer": pku_safer, "shp": shp,
    "ultrafeedback": ultrafeedback,
}
# Datasets that keep all rows in one split and name the real one in a column.
SPLIT_COLUMN = {"helpsteer2": "split"}
# Hub datasets whose `data.subset` is a folder, not a configuration.
FOLDERS = ("Anthropic/hh-rlhf", "nvidia/HelpSteer2", "stanfordnlp/SHP")


def _pair(row: Row, prompt: str, a: str, b: str, first: bool, used: tuple[str, ...] = ()) -> Row:
    better, worse = (a, b) if first else (b, a)
    for key in (prompt, a, b):
        if not isinstance(row.get(key), str):
            raise BadRow(f"'{key}' is not text")
    rest = {k: v for k, v in row.items() if k not in (prompt, a, b, *used)}
    return {**rest, "prompt": [{"role": "user", "content": row[prompt]}], "chosen": row[better], "rejected": row[worse]}


def _ranking(row: Row, prompt: str, texts: list[Any], key: str, marks: list[Any], used: tuple[str, ...]) -> Row:
    if not isinstance(row.get(prompt), str):
        raise BadRow(f"'{prompt}' is not text")
    if len(set(marks)) == 1:
        raise NoPreference(f"a tie: all {len(marks)} completions have the same {key.removesuffix('s')}")
    rest = {k: v for k, v in row.items() if k not in (prompt, *used)}
    asked = row[prompt] if prompt == "prompt" else [{"role": "user", "content": row[prompt]}]
    return {**rest, "prompt": asked, "completions": texts, key: marks}


def _choice(row: Row, key: str, allowed: Any) -> int:
    value = row.get(key)
    if value not in allowed:
        raise BadRow(f"'{key}' is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return int(value)


def _list(row: Row, key: str) -> list[Row]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"'{key}' is not a list of completions")
    return value


_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def _turns(prompt: list[Row]) -> list[Row]:
    """HelpSteer's marks between the turns of a longer prompt, as messages. The first turn is the user's and has no mark."""
    text = prompt[0]["content"]
    first, *rest = _MARK.split(text)
    said = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    if said[-1][0] == "Assistant" and not said[-1][1].strip():
        said.pop()  # a mark that only asks for the reply
    if any("<extra_id_" in part for _, part in said):
        raise BadRow("the prompt holds a mark of the form <extra_id_N> that is no User or Assistant turn")
    return [{"role": who.lower(), "content": part} for who, part in said]
