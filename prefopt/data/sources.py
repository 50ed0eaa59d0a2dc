"""Where rows come from: the user's files, the hub, the generated worlds. All yield (origin, row or BadRow)."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefopt.config.schema import ColumnsConfig, DataConfig, TrustConfig
from prefopt.data import bandit, emoji, known, picture_sources, pictures, tiny_feedback, tiny_pictures
from prefopt.data.records import BadRow, Example, Message, NoPreference, parse_row
from prefopt.errors import UserError

RawRow = tuple[str, "dict | BadRow"]


@dataclass
class Rejected:
    origin: str
    reason: str


@dataclass
class Split:
    """The usable examples of one split and the rows that could not be used, with reasons."""

    name: str
    examples: list[Example]
    rejected: list[Rejected] = field(default_factory=list)
    revision: str | None = None  # the hub commit that was read
    no_preference: Counter[str] = field(default_factory=Counter)  # reason -> rows without one, such as ties: expected, counted, not broken
    transforms: list[dict[str, Any]] = field(default_factory=list)  # what each data transform did: name, rows before and after, counts
    notes: list[str] = field(default_factory=list)  # what the user should know of how the data was read

    def digest(self) -> str:
        """sha256 over prompts, completions and labels, in order. Scores of pairs are left out: only transforms read them. Images count with
        their bytes."""
        h = hashlib.sha256()
        for e in self.examples:
            judged = [(None if e.kind == "pair" else c.score, c.desirable) for c in e.completions]
            h.update(repr(([_told(m) for m in e.prompt], [[_told(m) for m in c.messages] for c in e.completions],
                           judged, e.label, e.weight, e.margin)).encode())
        return h.hexdigest()


def _told(message: Message) -> Any:
    if message.user is not None:
        return message.plain(), message.user
    if message.picture is None:
        return message.plain()
    try:
        return message.plain(), pictures.identity(message.picture)
    except BadRow as reason:  # a bad row, which is told where it would be used
        return message.plain(), str(reason)


def load_data(cfg: DataConfig, trust: TrustConfig | None = None, unscored: bool = False) -> tuple[Split, Split]:
    """(train, eval) examples. With `on_bad_row=stop` the first unusable row raises a `UserError` naming file, row and reason. `unscored`
    takes rankings that are yet to be scored."""
    train_rows, eval_rows, revision = _raw(cfg, trust)
    train = _collect("train", train_rows, cfg, cfg.limit, revision, unscored)
    if eval_rows is not None:
        held_out = _collect("eval", eval_rows, cfg, cfg.eval_limit, revision, unscored)
    else:
        train, held_out = _hold_out(train, cfg)
    if cfg.source == "picture_folders":
        train.notes += picture_sources.notes(_train_folder(cfg), asdict(cfg.columns))
    if not train.examples:
        which = f".path={cfg.path}" if cfg.path else f"={cfg.name}"
        count = len(train.rejected) + train.no_preference.total()
        raise UserError(f"data{which}: no usable row among {count} (first reason: {_first(train)})")
    return train, held_out


def _first(split: Split) -> str:
    if not split.rejected and split.no_preference:
        return next(iter(split.no_preference))
    return f"{split.rejected[0].origin}: {split.rejected[0].reason}" if split.rejected else "the data is empty"


def _collect(
    name: str, rows: Iterable[RawRow], cfg: DataConfig, limit: int | None, revision: str | None, unscored: bool = False
) -> Split:
    split = Split(name, [], revision=revision)
    columns = asdict(ColumnsConfig() if cfg.source == "picture_folders" else cfg.columns)  # there they are names of folders
    as_canonical = known.ROWS.get(cfg.rows)  # those of images have been made where their files are known
    for origin, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            made = [parse_row(r, columns, origin, unscored) for r in (as_canonical(row) if as_canonical else [row])]
            for example in made:
                _check_pictures(example, cfg)
            split.examples += made
        except NoPreference as reason:
            split.no_preference[str(reason)] += 1
        except BadRow as reason:
            reject(split, origin, str(reason), cfg)
        if limit is not None and len(split.examples) >= limit:
            break
    return split


def _check_pictures(example: Example, cfg: DataConfig) -> None:
    has = bool(example.completions and example.completions[0].picture)
    if has and not cfg.pictures:
        raise UserError(f"{example.origin}: its completions are images; set data.pictures=true (as data=pictures does), and take a "
                        "diffusion model")
    if has:
        pictures.check_row(example)
    elif cfg.pictures and example.completions:
        raise BadRow("its completions are texts, and data.pictures=true says that they are images")


def reject(split: Split, origin: str, reason: str, cfg: DataConfig) -> None:
    """Counts a bad row, or stops the run, as `data.on_bad_row` says."""
    if cfg.on_bad_row == "stop":
        raise UserError(f"{origin}: {reason}. Mend the row, or set data.on_bad_row=skip to leave such rows out (they are counted).")
    split.rejected.append(Rejected(origin, reason))


def _hold_out(train: Split, cfg: DataConfig) -> tuple[Split, Split]:
    """A held-out share chosen by the hash of each prompt: equal prompts never stand on both sides, and all seeds are judged alike."""
    total = len(train.examples)
    wanted = min(int(cfg.eval_fraction * total), cfg.eval_limit or total)
    if wanted == 0:
        return train, Split("eval", [], revision=train.revision)

    def order(example: Example) -> str:
        return hashlib.sha256(example.prompt_text.encode()).hexdigest()

    ranked = sorted(range(total), key=lambda i: (order(train.examples[i]), i))
    cut = wanted
    while cut < total and order(train.examples[ranked[cut]]) == order(train.examples[ranked[cut - 1]]):
        cut += 1
    held = set(ranked[:cut]) if cut <= total // 2 else set()  # few prompts with many rows: better no held-out rows than no training rows
    held_out = Split("eval", [train.examples[i] for i in sorted(held)], revision=train.revision)
    kept = Split("train", [e for i, e in enumerate(train.examples) if i not in held], train.rejected, train.revision, train.no_preference)
    return kept, held_out


def _raw(cfg: DataConfig, trust: TrustConfig | None = None) -> tuple[Iterable[RawRow], Iterable[RawRow] | None, str | None]:
    if cfg.source == "tiny_feedback":
        def made(split: str, count: int) -> Iterator[RawRow]:
            rows = tiny_feedback.rows(split, count, 0, cfg.label_noise if split == "train" else 0.0,
                                      cfg.length_bias if split == "train" else 0.0, completions(cfg, split))
            return ((f"tiny-feedback {split} row {i + 1}", row) for i, row in enumerate(rows))
        return made("train", cfg.limit or 4000), made("eval", cfg.eval_limit or 256), None
    if cfg.source == "tiny_pictures":
        def drawn(split: str, count: int) -> Iterator[RawRow]:
            noise = cfg.label_noise if split == "train" else 0.0
            return _numbered(f"tiny-pictures {split}", tiny_pictures.rows(split, count, 0, noise, completions(cfg, split)))
        return drawn("train", cfg.limit or 1000), drawn("eval", cfg.eval_limit or 128), None
    if cfg.source == "emoji":
        return *emoji.rows(cfg.path, cfg.eval_fraction), emoji.VERSION
    if cfg.source == "picture_folders":
        return _folders(cfg, trust)
    if cfg.source == "bandit":
        return _numbered("bandit", bandit.pair_rows(cfg.label_noise)), _numbered("bandit", bandit.pair_rows(0.0)), None
    if cfg.source == "hub":
        return _hub(cfg)
    return _files(cfg, trust)


READ_RANKINGS = ("pairs", "reject")  # kinds of transforms that do


def completions(cfg: DataConfig, split: str) -> int:
    """Replies per prompt of a generated split. Where nothing is said, training rows are rankings of four if a transform reads rankings."""
    wanted = any((settings or {}).get("kind", name) in READ_RANKINGS for name, settings in cfg.transforms.items())
    return cfg.completions or (4 if wanted and split == "train" else 2)


def _numbered(name: str, rows: Iterable[dict]) -> Iterator[RawRow]:
    return ((f"{name} row {i + 1}", row) for i, row in enumerate(rows))


def _hub(cfg: DataConfig) -> tuple[Iterable[RawRow], Iterable[RawRow] | None, str | None]:
    """Rows of a hub dataset (or of a local folder with the same layout) and the commit they come from."""
    import datasets

    if not (cfg.path and cfg.train):
        raise UserError(f"data={cfg.name}: data.path (a hub id or folder) and data.train (a split) must be set for data.source=hub")
    datasets.disable_progress_bars()
    is_folder = cfg.subset and (cfg.path in known.FOLDERS or (Path(cfg.path).expanduser() / cfg.subset).is_dir())
    where = {"data_dir": cfg.subset} if is_folder else {"name": cfg.subset}
    try:
        loaded = datasets.load_dataset(cfg.path, revision=cfg.revision, **where)
    except Exception as error:  # the library raises a dozen unrelated types for "not there" and "not reachable"
        raise UserError(
            f"data.path={cfg.path} could not be loaded ({type(error).__name__}: {_line(error)}). "
            "Check the name and the network, or download it and use data=jsonl data.path=FILE with the same columns."
        ) from error
    picture_sources.refuse_hub_images(next(iter(loaded.values())), cfg.path)
    tables = {split: (table, range(len(table))) for split, table in loaded.items()}
    column = known.SPLIT_COLUMN.get(cfg.rows)
    if len(loaded) == 1 and column in (table := next(iter(loaded.values()))).column_names:
        values = table[column][:]
        tables = {split: (table, [i for i, v in enumerate(values) if v == split]) for split in dict.fromkeys(values)}
    for split in filter(None, (cfg.train, cfg.eval)):
        if split not in tables:
            raise UserError(f"data.path={cfg.path} has no split '{split}'; it has {', '.join(map(str, tables))}. "
                            "Set data.train or data.eval.")

    def rows(split: str) -> Iterator[RawRow]:
        table, numbers = tables[split]
        return ((f"{cfg.path} {split} row {i + 1}", table[i]) for i in numbers)

    return rows(cfg.train), rows(cfg.eval) if cfg.eval else None, _commit(tables[cfg.train][0]) or cfg.revision


def _commit(table: Any) -> str | None:
    """The hub commit of a loaded split: from the addresses it was fetched from, or from the folder where `datasets` keeps it."""
    urls = table.info.download_checksums or {}
    if found := next((url.split("@")[1].split("/")[0] for url in urls if url.startswith("hf://") and "@" in url), None):
        return found
    folders = (Path(file["filename"]).parent.name for file in table.cache_files)
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)


def _folders(cfg: DataConfig, trust: TrustConfig | None = None) -> tuple[Iterable[RawRow], Iterable[RawRow] | None, str | None]:
    """Rows of folders of images with captions."""
    if not cfg.path:
        raise UserError(f"data={cfg.name}: data.path is not set; give a folder of images")
    root, columns = Path(cfg.path).expanduser(), asdict(cfg.columns)
    inside = None if trust and trust.paths else root
    train = picture_sources.folder(_train_folder(cfg), columns, "data.train" if cfg.train else "data.path", inside)
    return train, picture_sources.folder(root / cfg.eval, columns, "data.eval", inside) if cfg.eval else None, None


def _train_folder(cfg: DataConfig) -> Path:
    return Path(cfg.path).expanduser() / (cfg.train or "")


def _files(cfg: DataConfig, trust: TrustConfig | None = None) -> tuple[Iterable[RawRow], Iterable[RawRow] | None, str | None]:
    if not cfg.path:
        raise UserError(f"data={cfg.name}: data.path is not set; give a file, a folder or a glob")
    root = Path(cfg.path).expanduser()
    if root.is_file() and cfg.train:
        raise UserError(f"data.path={root} is a file, and data.train={cfg.train} names one in a folder; set data.train=null data.eval=null")
    train = _expand(root / cfg.train if cfg.train else root, "data.train" if cfg.train else "data.path")
    held_out = None
    if cfg.eval:
        held_out = _expand(root / cfg.eval if root.is_dir() else Path(cfg.eval).expanduser(), "data.eval")
        apart = {f.resolve() for f in held_out}
        train = [f for f in train if f.resolve() not in apart]
    trusted = bool(trust and trust.paths)
    chain = lambda files: (pair for file in files for pair in picture_sources.of_table(file, read_file(file), cfg, trusted))  # noqa: E731
    return chain(train), chain(held_out) if held_out else None, None


READERS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def check_files(cfg: DataConfig, trust: TrustConfig | None = None) -> None:
    """Raises `UserError` if `cfg` names files and they are not there. Reads none of them."""
    if cfg.source == "files":
        _files(cfg)
    elif cfg.source == "picture_folders":
        _folders(cfg, trust)


def first_example(cfg: DataConfig, trust: TrustConfig | None = None) -> Example | None:
    """The first usable row of the files that `cfg` names. Bad rows before it are met as `data.on_bad_row` says."""
    return next(iter(_collect("train", _files(cfg, trust)[0], cfg, 1, None).examples), None)


def _expand(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(READERS))
        if not files:
            raise UserError(f"{key}={path}: the folder holds no {', '.join(READERS)} file")
        return files
    if not path.exists() and any(c in str(path) for c in "*?["):
        found = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if f.endswith(READERS)]
        if not found:
            raise UserError(f"{key}={path}: no {', '.join(READERS)} file matches (looked from {Path.cwd()})")
        return found
    if not path.is_file():
        raise UserError(f"{key}={path}: there is no such file (looked from {Path.cwd()})")
    if not path.name.endswith(READERS):
        raise UserError(f"{key}={path}: cannot read this kind of file; use {', '.join(READERS)}")
    return [path]


def read_file(path: Path) -> Iterator[RawRow]:
    """Rows of a jsonl(.gz), json or parquet file. A malformed line is yielded as a `BadRow` in its place."""
    try:
        if path.suffix == ".parquet":
            yield from _numbered(str(path), picture_sources.parquet_rows(path))
        elif path.suffix == ".json":
            text = path.read_text(encoding="utf-8-sig")
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise UserError(f"{path}: a .json file must hold a list of rows; use .jsonl for one row per line")
            yield from ((f"{path} row {i + 1}", _row(r, HALVES in text.lower())) for i, r in enumerate(rows))
        else:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path} row {number}", _json(line)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {_line(error)})") from error
    except Exception as error:
        if type(error).__module__.startswith("pyarrow"):
            raise UserError(f"{path}: is not a readable parquet file ({_line(error)})") from error
        raise


def _json(line: bytes) -> dict | BadRow:
    try:
        text = line.decode("utf-8-sig")
        return _row(json.loads(text), HALVES in text.lower())
    except json.JSONDecodeError as error:
        return BadRow(f"malformed JSON ({error.msg} at column {error.colno})")
    except ValueError as error:  # bytes that are no UTF-8, a number of thousands of digits
        return BadRow(f"malformed JSON ({_line(error)})")


HALVES = "\\ud"  # how JSON begins either half of a character beyond the first 65,536


def _row(value: object, halves: bool = False) -> dict | BadRow:
    """The row, looked through for halves of characters where there may be some: no tokenizer takes them, and no file holds them."""
    if not isinstance(value, dict):
        return BadRow("not a JSON object")
    try:
        if halves:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return BadRow(f"it holds half of a character (\\u{ord(error.object[error.start]):04x} alone), as a text does that was cut in two")
    return value


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
