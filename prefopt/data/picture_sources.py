"""Image rows: published image preferences, tables that name image files, and folders of images with captions.

Rows come out in the canonical shape (`prefopt.data.records`), each image with an absolute path, or as a cell of a parquet file, which is
read when it is needed. A path is relative to the file that names it (published sets: or to their own image folder); one that leads out of
the data's folder is refused unless `trust.paths=true`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from prefopt.config.schema import DataConfig
from prefopt.data.pictures import SUFFIXES
from prefopt.data.records import BadRow, NoPreference, is_picture
from prefopt.errors import UserError

Row = dict[str, Any]
RawRow = tuple[str, "dict | BadRow"]
SIDES = ("chosen", "rejected", "completion", "completions")


# ---- published sets ------------------------------------------------------------------------------------


def pickapic(row: Row, soft: bool = False) -> Row:
    """Pick-a-Pic v1 and v2: two images as bytes, label_0 + label_1 = 1, and 0.5 each for a tie."""
    for key in ("caption", "jpg_0", "jpg_1", "label_0", "label_1"):
        if key not in row:
            raise UserError(f"data.rows=pickapic: the table has no column '{key}' (it has {', '.join(sorted(row))}). Versions without "
                            "images cannot be trained on: get the one with jpg_0 and jpg_1.")
    if row.get("has_label") is False:
        raise NoPreference("has_label is false: nobody has judged it")
    if row.get("are_different") is False:
        raise NoPreference("are_different is false: its two images are the same")
    first, second = row["label_0"], row["label_1"]
    if first not in (0, 0.5, 1) or second != 1 - first:
        raise BadRow(f"label_0 is {first} and label_1 is {second}; they must be 1 and 0, 0 and 1, or 0.5 both")
    if first == 0.5 and not soft:
        raise NoPreference("a tie: both labels are 0.5")
    better, worse = ("jpg_0", "jpg_1") if first >= 0.5 else ("jpg_1", "jpg_0")
    rest = _rest(row, "caption", "jpg_0", "jpg_1", "label_0", "label_1")
    return {**rest, "prompt": row["caption"], "chosen": _image(row, better), "rejected": _image(row, worse), "label": max(first, second)}


def hpdv2(row: Row) -> Row:
    """HPD v2: two images with `human_preference` 1 for the preferred one (train.json), or several with a `rank`, 1 is best (test.json)."""
    images = row.get("image_path", row.get("file_path"))
    if not isinstance(images, list) or len(images) < 2:
        raise BadRow("neither 'image_path' nor 'file_path' is a list of two or more images")
    rest = _rest(row, "image_path", "file_path", "human_preference", "rank")
    if row.get("rank") is not None:
        return _ranking(rest, row.get("prompt"), images, row["rank"])
    marks = row.get("human_preference")
    if not isinstance(marks, list) or sorted(marks) not in ([0, 1], [0, 0], [1, 1]) or len(images) != 2:
        raise BadRow(f"human_preference is {str(marks)[:40]} for {len(images)} images; it must be [1, 0] or [0, 1]")
    if marks[0] == marks[1]:
        raise NoPreference("a tie: human_preference is the same for both images")
    better = marks.index(1)
    return {**rest, "prompt": row.get("prompt"), "chosen": {"image": images[better]}, "rejected": {"image": images[1 - better]}}


def hpdv3(row: Row, soft: bool = False) -> Row:
    """HPD v3: path1 is preferred to path2; `choice_dist` counts the votes for both, `confidence` says how sure the annotators are."""
    for key in ("prompt", "path1", "path2"):
        if not isinstance(row.get(key), str):
            raise BadRow(f"'{key}' is not text")
    votes = row.get("choice_dist")
    rest = _rest(row, "prompt", "path1", "path2", "choice_dist")
    out = {**rest, "prompt": row["prompt"], "chosen": {"image": row["path1"]}, "rejected": {"image": row["path2"]}}
    if not soft:
        return out
    if not isinstance(votes, (list, tuple)) or len(votes) != 2 or not sum(votes) > 0 or min(votes) < 0:
        raise BadRow(f"choice_dist is {str(votes)[:40]}; soft labels need the votes for both images")
    return {**out, "label": votes[0] / sum(votes)}


def imagereward(row: Row) -> Row:
    """ImageReward: `generations` of a prompt and their `ranking`, 1 is best. ImageRewardDB's one row per image is made into such rows
    by `_by_prompt`."""
    images = row.get("generations")
    if not isinstance(images, list) or len(images) < 2:
        raise NoPreference("fewer than two images of its prompt")
    return _ranking(_rest(row, "generations", "ranking"), row.get("prompt"), images, row.get("ranking"))


def _ranking(rest: Row, prompt: Any, images: list[Any], ranks: Any) -> Row:
    if isinstance(ranks, list) and len(set(map(str, ranks))) == 1 and len(ranks) == len(images):
        raise NoPreference(f"a tie: all {len(images)} images have the same rank")
    return {**rest, "prompt": prompt, "completions": [{"image": image} for image in images], "ranks": ranks}


def _by_prompt(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """ImageRewardDB's rows (prompt_id, prompt, image_path or image, rank) as one row per prompt, in the order of their first image."""
    groups: dict[Any, tuple[str, Row]] = {}
    for origin, row in rows:
        if isinstance(row, BadRow) or "generations" in row:
            yield origin, row
            continue
        if missing := [key for key in ("prompt_id", "prompt", "rank") if key not in row]:
            yield origin, BadRow(f"'{missing[0]}' is not there; a row has prompt_id, prompt, image_path and rank, or prompt, generations "
                                 "and ranking")
            continue
        _, made = groups.setdefault(row["prompt_id"], (origin, {"prompt": row["prompt"], "generations": [], "ranking": []}))
        image = row.get("image_path", row.get("image"))
        made["generations"].append(image["image"] if is_picture(image) else image)
        made["ranking"].append(row["rank"])
    yield from groups.values()


def _image(row: Row, key: str) -> Row:
    return row[key] if is_picture(row[key]) else {"image": row[key]}


def _rest(row: Row, *used: str) -> Row:
    return {k: v for k, v in row.items() if k not in used}


def _as_images(row: Row, names: Iterable[str]) -> Row:
    """The row with texts in the columns of completions as paths of images."""
    out = dict(row)
    for name in names:
        value = out.get(name)
        if isinstance(value, str):
            out[name] = {"image": value}
        elif isinstance(value, (list, tuple)):
            out[name] = [{"image": v} if isinstance(v, str) else v for v in value]
    return out


# Chosen by `data.rows`. The names stand in prefopt.config.schema.CHOICES, too.
ROWS: dict[str, Callable[[Row], Row]] = {
    "hpdv2": hpdv2, "hpdv3": hpdv3, "hpdv3-soft": lambda row: hpdv3(row, soft=True), "imagereward": imagereward,
    "pickapic": pickapic, "pickapic-soft": lambda row: pickapic(row, soft=True),
}  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------------


def image_columns(schema: Any) -> dict[str, str]:
    """Columns of a parquet schema that hold encoded images, with how: "bytes", "struct" ({bytes, path}), "list of bytes" or "list of
    structs". They are not read with the rows."""
    import pyarrow as pa

    def kind(of: Any) -> str | None:
        if pa.types.is_binary(of) or pa.types.is_large_binary(of):
            return "bytes"
        if pa.types.is_struct(of) and any(of.field(i).name == "bytes" and kind(of.field(i).type) for i in range(of.num_fields)):
            return "struct"
        return None

    found = {}
    for column in schema:
        of = column.type
        if pa.types.is_list(of) or pa.types.is_large_list(of):
            if inner := kind(of.value_type):
                found[column.name] = f"list of {inner}"
        elif simple := kind(of):
            found[column.name] = simple
    return found


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file; cells that hold images are only named: {"image": {"path", "row", "column"}}."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file, where, number = pq.ParquetFile(path), os.path.abspath(path), 0
    images = image_columns(file.schema_arrow)
    plain = [name for name in file.schema_arrow.names if name not in images]
    lists = [name for name, kind in images.items() if kind.startswith("list")]
    for batch in file.iter_batches(256, columns=[*plain, *lists]):
        lengths = {name: pc.list_value_length(batch.column(name)).to_pylist() for name in lists}
        for i, row in enumerate(batch.select(plain).to_pylist() if plain else [{} for _ in range(batch.num_rows)]):
            for name in images:
                cell = {"path": where, "row": number, "column": name}
                many = range(lengths[name][i] or 0) if name in lists else None
                row[name] = {"image": cell} if many is None else [{"image": {**cell, "index": k}} for k in many]
            yield row
            number += 1
    if not plain and not lists:  # a batch of no columns has no rows
        yield from ({name: {"image": {"path": where, "row": i, "column": name}} for name in images} for i in range(file.metadata.num_rows))


def of_table(file: Path, rows: Iterable[RawRow], cfg: DataConfig, trusted: bool) -> Iterator[RawRow]:
    """The rows of a file with their images made findable; those of a published set (`data.rows`) in canonical shape. Rows without images
    pass as they are."""
    root = Path(cfg.path).expanduser() if cfg.path else file.parent
    root = root if root.is_dir() else file.parent
    own = os.path.abspath(file)  # cells of a parquet file name it so
    convert, columns = ROWS.get(cfg.rows), asdict(cfg.columns)
    names = SIDES if convert else [columns[side] for side in SIDES if columns[side]]
    bases = [file.parent, *([file.parent / file.stem, root] if convert else [])]
    for origin, row in _by_prompt(rows) if cfg.rows == "imagereward" else rows:
        try:
            if not isinstance(row, BadRow):
                row = convert(row) if convert else row
                row = _located(_as_images(row, names) if cfg.pictures else row, names, bases, None if trusted else root, own)
            yield origin, row
        except BadRow as reason:
            yield origin, reason


def _located(row: Row, names: Iterable[str], bases: list[Path], root: Path | None, own: str) -> Row:
    """The row with absolute paths to its images. Changes nothing else."""
    for name in names:
        side = row.get(name)
        if isinstance(side, dict) and "image" in side:
            row = {**row, name: _side(side, bases, root, own)}
        elif isinstance(side, list) and any(isinstance(s, dict) and "image" in s for s in side):
            row = {**row, name: [_side(s, bases, root, own) if isinstance(s, dict) and "image" in s else s for s in side]}
    return row


def _side(side: Row, bases: list[Path], root: Path | None, own: str) -> Row:
    image = side["image"]
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str):
        return side  # parse_row says what is wrong
    if path == own:
        return side
    found = find(path, bases, root)
    return {**side, "image": {**image, "path": found} if isinstance(image, dict) else found}


def find(path: str, bases: list[Path], root: Path | None) -> str:
    """The file that a path means, the first that is there. Without a `root` it may be anywhere. Raises `BadRow`."""
    try:
        places = [os.path.abspath(base / Path(path).expanduser()) for base in bases]
        os.fsencode(path)
        if "\0" in path:
            raise ValueError("it holds a null character")
    except (ValueError, RuntimeError) as error:  # RuntimeError: the home of nobody
        raise BadRow(f"{path[:40]!r} cannot be the path of an image ({error})") from error
    if root is not None:
        if os.path.isabs(os.path.expanduser(path)) or _leads_out(places[0], root, bases[0]):
            raise BadRow(f"the image path {path} leads out of the data's folder; trust.paths=true allows it")
    return next((place for place in places if os.path.isfile(place)), places[0])


_real = lru_cache(maxsize=64)(os.path.realpath)


def _leads_out(place: str | Path, *roots: Path) -> bool:
    """Whether a path, its links followed, lies in none of the folders."""
    where = os.path.realpath(place) + os.sep
    return not any(where.startswith(_real(os.path.join(os.getcwd(), root)) + os.sep) for root in roots)  # what is kept holds anywhere


def refuse_hub_images(table: Any, path: str) -> None:
    """Images of hub datasets are read from their files: through the library all of them would be held in memory."""
    if image_columns(table.features.arrow_schema):
        raise UserError(f"data.path={path} holds images. Fetch its files (hf download --repo-type dataset {path} --local-dir FOLDER) and "
                        "read them from there: data=pictures data.path=FOLDER, or data=pickapic-v2 and the like for published sets.")


# ---- folders -------------------------------------------------------------------------------------------


CAPTIONS = (".txt", ".caption")  # the endings of files that hold a caption; the first that is there
KOHYA = ("w", "l")  # what sd-scripts (its pull request 1427) calls winners and losers; they lie in folders called REPEATS_NAME
REPEATS = re.compile(r"\d+_.")


def folder(path: Path, columns: dict[str, str | None], key: str = "data.path", root: Path | None = None) -> Iterator[RawRow]:
    """Images with captions in text files of the same name. Where there are two folders, called as `data.columns.chosen` and `.rejected`
    say, or w and l, files of one name in both are pairs (the caption may stand beside either); otherwise each image is a demonstration.
    With a `root` the two folders must lie in it."""
    if sides := _sides(path, columns, key, root):
        found = [(images_in(chosen, key), images_in(rejected, key), chosen, rejected) for chosen, rejected in sides]
        return chain.from_iterable(_pairs(*pair) for pair in found)
    return ((str(file), _demonstration(file)) for file in images_in(path, key))


def notes(path: Path, columns: dict[str, str | None]) -> list[str]:
    """What the user should know of how a folder is read."""
    numbered = [chosen.parent.name for chosen, _ in _sides(path, columns, "data.path", None) if REPEATS.match(chosen.parent.name)]
    shown = ", ".join(numbered[:3]) + (", ..." if len(numbered) > 3 else "")
    return [f"the repeat numbers of folders ({shown}) are ignored, each pair counts once"] if numbered else []


def _sides(path: Path, columns: dict[str, str | None], key: str, root: Path | None) -> list[tuple[Path, Path]]:
    """The folders of chosen and rejected images: in the folder itself, or else in each of those in it that are called REPEATS_NAME."""
    if own := _two(path, columns, key, root):
        return [own]
    inner = sorted(part for part in path.glob("*") if part.is_dir() and REPEATS.match(part.name))
    found = {part: _two(part, columns, key, root) for part in inner}
    if any(found.values()) and (bare := [part.name for part, two in found.items() if two is None]):
        raise UserError(f"{key}={path}: {bare[0]} holds no folders of chosen and rejected images, and others do; move it elsewhere, or "
                        "take them one by one")
    return [two for two in found.values() if two]


def _two(path: Path, columns: dict[str, str | None], key: str, root: Path | None) -> tuple[Path, Path] | None:
    for names in ([columns[side] or side for side in ("chosen", "rejected")], KOHYA):
        chosen, rejected = two = tuple(Path(os.path.normpath(path / Path(name).expanduser())) for name in names)
        there = [side for side in two if side.is_dir()]
        if len(there) == 1 and (names is not KOHYA or _holds_only(path, there[0])):
            lacking = rejected if there[0] == chosen else chosen
            raise UserError(f"{key}={path}: there is a folder {there[0].name} and none called {lacking.name}; pairs are files of the same "
                            "name in both (other names or paths from there: data.columns.chosen=NAME data.columns.rejected=NAME)")
        if len(there) < 2:
            continue
        if root is not None and (out := [n for n, side in zip(names, two, strict=True) if _leads_out(side, root, path)]):
            raise UserError(f"{key}={path}: the folder {out[0]} leads out of the data's folder; trust.paths=true allows it")
        if not (_leads_out(chosen, rejected) and _leads_out(rejected, chosen)):
            raise UserError(f"{key}={path}: of the folders {names[0]} and {names[1]} one lies in the other; pairs need two apart "
                            "(data.columns.chosen, data.columns.rejected)")
        return chosen, rejected
    return None


def _holds_only(path: Path, one: Path) -> bool:
    """Whether there is nothing but this folder in the other. Beside others, w and l may be any letters."""
    return [part for part in path.iterdir() if not part.name.startswith(".")] == [one]


def images_in(path: Path, key: str = "data.path") -> list[Path]:
    """The image files of a folder and of those in it, in order."""
    if not path.is_dir():
        raise UserError(f"{key}={path}: there is no such folder (looked from {Path.cwd()})")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not found:
        raise UserError(f"{key}={path}: the folder holds no image ({', '.join(SUFFIXES)})")
    return found


def _pairs(better: list[Path], worse: list[Path], chosen: Path, rejected: Path) -> Iterator[RawRow]:
    sides = [_by_name(better, chosen), _by_name(worse, rejected)]
    for name in sorted({*sides[0], *sides[1]}):
        files = [side.get(name, []) for side in sides]
        origin = str((files[0] or files[1])[0])
        if not all(files):
            yield origin, BadRow(f"there is no image {name} in {(rejected if files[0] else chosen).name}")
        elif len(files[0]) > 1 or len(files[1]) > 1:
            twice = max(files, key=len)
            yield origin, BadRow(f"{twice[0].name} and {twice[1].name} have the same name but for their ending")
        else:
            yield origin, _pair(files[0][0], files[1][0])


def _by_name(files: list[Path], root: Path) -> dict[str, list[Path]]:
    out: dict[str, list[Path]] = {}
    for file in files:
        out.setdefault(file.relative_to(root).with_suffix("").as_posix(), []).append(file)
    return out


def _pair(better: Path, worse: Path) -> dict | BadRow:
    said = [_caption(file) for file in (better, worse)]
    if bad := next((s for s in said if isinstance(s, BadRow)), None):
        return bad
    caption = said[0] if said[0] is not None else said[1]
    if caption is None:
        return BadRow(f"it has no caption: there is no {_texts(better)} in either folder")
    own = {} if said[1] in (None, caption) else {"caption": said[1]}  # a caption of its own, as in a table
    return {"prompt": caption, "chosen": {"image": os.path.abspath(better)}, "rejected": {"image": os.path.abspath(worse), **own}}


def _demonstration(file: Path) -> dict | BadRow:
    caption = _caption(file)
    if caption is None:
        return BadRow(f"it has no caption: there is no {_texts(file)}")
    return caption if isinstance(caption, BadRow) else {"prompt": caption, "completion": {"image": os.path.abspath(file)}}


def _texts(file: Path) -> str:
    return " or ".join(file.with_suffix(ending).name for ending in CAPTIONS)


def _caption(file: Path) -> str | None | BadRow:
    """What the text file beside an image says; None: there is none."""
    for text in (file.with_suffix(ending) for ending in CAPTIONS):
        try:
            return text.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            return BadRow(f"its caption {text.name} cannot be read ({type(error).__name__})")
    return None
