"""`prefopt store ls | verify | gc`: what was computed once: reference scores, encoded images and captions. Imports no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from prefopt.config.schema import ReferenceConfig
from prefopt.errors import UserError, nearest
from prefopt.paths import store_dir
from prefopt.policies import store

KINDS = ("reference", "latents", "captions")  # folders of the store, each with one folder per scorer or encoder
ACTIONS = ("ls", "verify", "gc")
USAGE = "prefopt store ls | verify | gc [--limit-gb X] [--all]"


def main(argv: Sequence[str]) -> None:
    """The command line. `verify` exits with 1 if a shard is damaged."""
    action, rest = argv[0] if argv else "", list(argv[1:])
    roots = [store_dir() / kind for kind in KINDS]
    if action not in ACTIONS:
        said = f"unknown command 'store {action}'{nearest(action, ACTIONS)}" if action else "prefopt store is no command of its own"
        raise UserError(f"{said} ({USAGE})")
    if action == "gc":
        print(collect(roots, *_limit(rest)))
        return
    if rest:
        raise UserError(f"prefopt store {action} takes nothing more, and was given {rest[0]} ({USAGE})")
    if action == "ls":
        print("\n\n".join([listing(root) for root in roots if store.scorers(root)]) or f"{store_dir()} holds nothing")
        return
    checked = [store.verify(root) for root in roots]
    count, broken = sum(n for n, _ in checked), [path for _, paths in checked for path in paths]
    for path in broken:
        print(f"damaged: {path}")
    if broken:
        print(f"{len(broken)} of {count} shards are damaged; `prefopt store gc` removes them, and their entries are computed again")
        raise SystemExit(1)
    print(f"{store_dir()}: {count} shards, all as they were written")


def _limit(words: list[str]) -> tuple[float | None, bool]:
    """(limit in GB if one is given, whether everything goes) of the command line of `gc`."""
    limit, everything = None, False
    while words:
        word = words.pop(0)
        if word == "--all":
            everything = True
        elif word == "--limit-gb" or word.startswith("--limit-gb="):
            text = word.partition("=")[2] or (words.pop(0) if words and word == "--limit-gb" else "")
            try:
                limit = float(text)
            except ValueError:
                limit = math.nan
            if not 0 <= limit < math.inf:
                raise UserError(f"--limit-gb {text}: it must be a number of gigabytes, 0 or more ({USAGE})")
        else:
            raise UserError(f"prefopt store gc does not know {word}{nearest(word, ('--limit-gb', '--all'))} ({USAGE})")
    return limit, everything


def listing(root: Path) -> str:
    """One line per scorer or encoder, the most recently used first."""
    found = store.scorers(root)
    if not found:
        return f"{root} holds nothing"
    rows = [("scorer" if root.name == "reference" else root.name, "model", "precision", "entries", "shards", "size", "last used")]
    for s in found:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(s.last)) if s.last else "never"
        model = s.model + (" with an adapter" if s.identity.get("adapter") else "")
        precision = str(s.identity.get("precision", ""))
        rows.append((s.folder.name[:12], model, precision, f"{s.entries:,}", str(s.shards), in_bytes(s.bytes), last))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"{in_bytes(sum(s.bytes for s in found))} in {root}"])


def collect(roots: Sequence[Path], limit: float | None, everything: bool) -> str:
    """Makes room, and says what went. The limit is for each kind; where none is given, only reference scores have one, since encoding
    images anew takes longest."""
    gone: dict[str, list[Path]] = {}
    for root in roots:
        own = limit if limit is not None else ReferenceConfig().store_limit_gb if root.name == "reference" else math.inf
        for key, went in store.collect(root, 0.0 if everything else own * 1e9).items():
            gone.setdefault(key, []).extend(went)
    words = {"damaged": "damaged shards", "stale": "files of killed writers", "evicted": "shards not used for longest"}
    told = ", ".join(f"{len(gone[key])} {what}" for key, what in words.items())
    left = sum(s.bytes for root in roots for s in store.scorers(root))
    return f"removed {told}; {in_bytes(left)} left in {store_dir()}"


def in_bytes(count: float) -> str:
    """1234567 as 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
