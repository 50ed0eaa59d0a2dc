"""What a frozen scorer says of replies, kept on disk: log-probs are computed once and read by every run that needs them.

    <root>/<digest of the scorer's identity>/identity.json             what the scorer is, for people
    <root>/<digest of the scorer's identity>/<sha256>.safetensors      shards; the name is the sha256 of the content

A shard holds n entries: `keys` uint8 [n, 16] (see `entry_key`), `lengths` int32 [n] (trained tokens of the reply) and `values` fp32, in
nats: the log-prob of each trained token, [sum of lengths], or their sum per reply, [n]; its metadata says which. Shards are written under
a temporary name and renamed, and never change, so readers need no lock and writers cannot harm each other. Who fills a folder holds
<root>/<digest>.lock, so that nothing is computed twice. Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.numpy import load, save

from prefopt.data.shards import damaged, digest_of
from prefopt.data.shards import write_aside as _write
from prefopt.errors import UserError
from prefopt.paths import store_dir

__all__ = ["Scorer", "Store", "collect", "damaged", "digest_of", "entry_key", "evict", "reference_root", "scorers", "shards", "verify"]

LEVELS = ("tokens", "sums")
STALE = 3600.0  # seconds after which a temporary file belongs to a writer that was killed: a shard is written in seconds


def reference_root() -> Path:
    return store_dir() / "reference"


def entry_key(prompt: Sequence[int], ids: Sequence[int], mask: Sequence[bool]) -> bytes:
    """16 bytes that stand for a reply under its prompt: everything that decides its log-probs but the scorer."""
    h = hashlib.blake2b(np.array([len(prompt), len(ids)], dtype="<i8").tobytes(), digest_size=16)
    h.update(np.array([*prompt, *ids], dtype="<i8").tobytes())
    h.update(bytes(mask))
    return h.digest()


class Store:
    """The entries of one scorer, as far as they are `wanted`. Nothing is read before `refresh`.

    `level` is what the reader needs: `tokens`, or `sums`, which entries of either kind can give.
    """

    def __init__(self, identity: Mapping[str, Any], wanted: Collection[bytes], level: str, about: str = "", root: Path | None = None):
        assert level in LEVELS
        self.identity, self.level, self.about = dict(identity), level, about
        self.digest = digest_of(identity)
        self.folder = (root or reference_root()) / self.digest
        self.wanted = set(wanted)
        self.found: dict[bytes, np.ndarray] = {}  # key -> [trained tokens] or [1]
        self.rough: set[bytes] = set()  # sums that were made here from token log-probs
        self.seen: set[str] = set()
        self.used: set[Path] = set()  # shards that wanted entries came from, or that were written here
        self.lock = FileLock(self.folder.with_name(f"{self.digest}.lock"))

    def refresh(self) -> None:
        """Reads the shards that are there and were not read yet. Raises `UserError` for a damaged one."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.seen:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # somebody else made room since
                continue
            if damaged(path, content):
                raise UserError(f"{path} is damaged: its content does not match its name. `prefopt store gc` removes damaged shards, whose "
                                "entries are then computed again; `prefopt store verify` lists them.")
            self.seen.add(path.name)
            if self._take(content):
                self.used.add(path)

    def _take(self, content: bytes) -> bool:
        """Whether a shard had wanted entries."""
        shard, level = load(content), _level(content)
        if level == "sums" and self.level == "tokens":
            return False
        lengths, keys, took = shard["lengths"], shard["keys"].tobytes(), False
        ends = np.cumsum(lengths) if level == "tokens" else np.arange(1, len(lengths) + 1)
        begins = np.concatenate([[0], ends[:-1]]).astype(int)
        for i in range(len(lengths)):
            key = keys[16 * i : 16 * (i + 1)]
            if key not in self.wanted:
                continue
            rough = level != self.level
            # A sum that was stored as one comes first: it does not depend on what else has been written since.
            if key not in self.found or (key in self.rough and not rough):
                values = shard["values"][begins[i] : ends[i]]
                self.found[key] = values.sum(keepdims=True) if rough else values.copy()
                (self.rough.add if rough else self.rough.discard)(key)
                took = True
        return took

    def missing(self) -> set[bytes]:
        return self.wanted - self.found.keys()

    def alone(self, seconds: float) -> bool:
        """Waits so long for others that fill the store of this scorer; whether it is this process's turn, until `release`. The system ends
        the turn of a process that is killed."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=seconds)
        except Timeout:
            return False
        except NotImplementedError:  # a file system without locks: all fill at once, and some work is done twice
            return True
        except OSError as error:
            raise self._unwritable(error) from error
        return True

    def release(self) -> None:
        self.lock.release()

    def _unwritable(self, error: OSError) -> Exception:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            return error
        return UserError(f"the reference store {self.folder} cannot be written ({error.strerror}); set PREFOPT_STORE to a folder that can, "
                         "or reference.store=off")

    def add(self, entries: Mapping[bytes, np.ndarray], lengths: Mapping[bytes, int]) -> None:
        """Writes one shard of entries of this store's level: fp32 [trained tokens], or [1] for a sum."""
        if not entries:
            return
        keys = sorted(entries)  # the same entries make the same file
        content = save({
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
            "lengths": np.array([lengths[k] for k in keys], dtype=np.int32),
            "values": np.concatenate([np.asarray(entries[k], dtype=np.float32) for k in keys]),
        }, metadata={"values": self.level})  # fmt: skip
        try:
            known = self.folder / "identity.json"
            if not known.is_file():
                _write(known, json.dumps({"model": self.about, "identity": self.identity}, indent=2).encode())
            path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
            _write(path, content)
        except OSError as error:
            raise self._unwritable(error) from error
        self.seen.add(path.name)
        self.used.add(path)
        self.found |= {k: np.asarray(entries[k], dtype=np.float32) for k in keys}

    def touch(self) -> None:
        """Marks the shards in use as such, for eviction by least recent use."""
        for path in self.used:
            try:
                os.utime(path)
            except OSError:  # evicted meanwhile, or somebody else's: what was read is in memory
                pass


def _level(content: bytes) -> str:
    header = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + header])["__metadata__"]["values"]


# ---- all of it: prefopt store ls | verify | gc --------------------------------------------------------


@dataclass
class Scorer:
    """One folder of the store, for a listing. `last` is when a run last used one of its shards, in seconds since 1970."""

    folder: Path
    model: str
    identity: dict[str, Any]
    shards: int = 0
    entries: int = 0
    bytes: int = 0
    last: float = 0.0


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def scorers(root: Path) -> list[Scorer]:
    """What is there, the most recently used first."""
    found = []
    for folder in sorted(p for p in root.glob("*") if p.is_dir()):
        try:
            kept = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
            scorer = Scorer(folder, kept["model"], kept["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            scorer = Scorer(folder, "unknown", {})
        for path in sorted(folder.glob("*.safetensors")):
            try:
                about = path.stat()
                with safe_open(path, framework="np") as shard:
                    scorer.entries += shard.get_slice("keys").get_shape()[0]
            except FileNotFoundError:
                continue
            except Exception as error:  # safetensors' own type, for which `verify` has the words
                if type(error).__name__ != "SafetensorError":
                    raise
            scorer.shards, scorer.bytes, scorer.last = scorer.shards + 1, scorer.bytes + about.st_size, max(scorer.last, about.st_mtime)
        found.append(scorer)
    return sorted(found, key=lambda s: (-s.last, s.folder.name))


def verify(root: Path) -> tuple[int, list[Path]]:
    """(number of shards, those whose content does not match their name)."""
    every = shards(root)
    return len(every), [path for path in every if path.exists() and damaged(path)]


def evict(root: Path, limit: float, keep: Iterable[Path] = ()) -> list[Path]:
    """Removes the least recently used shards until the rest is within `limit` bytes; never those in `keep`. Returns what went."""
    kept, sizes = set(keep), {}
    for path in shards(root):
        try:
            about = path.stat()
        except FileNotFoundError:
            continue
        sizes[path] = (about.st_mtime_ns, about.st_size)
    total, gone = sum(size for _, size in sizes.values()), []
    for path in sorted(sizes, key=lambda p: (sizes[p][0], p.name)):
        if total <= limit:
            break
        if path not in kept:
            path.unlink(missing_ok=True)
            total -= sizes[path][1]
            gone.append(path)
    for folder in {path.parent for path in gone}:
        _remove_empty(folder)
    return gone


def collect(root: Path, limit: float) -> dict[str, list[Path]]:
    """Removes what killed writers left, damaged shards, and shards over the limit in bytes."""
    now, stale = time.time(), []
    for part in sorted(root.glob("*/.*.part")):
        try:
            if now - part.stat().st_mtime > STALE:
                part.unlink()
                stale.append(part)
        except FileNotFoundError:
            continue
    broken = verify(root)[1]
    for path in broken:
        path.unlink(missing_ok=True)
    gone = evict(root, limit)
    for folder in root.glob("*"):
        _remove_empty(folder)
    return {"stale": stale, "damaged": broken, "evicted": gone}


def _remove_empty(folder: Path) -> None:
    """Takes away the folder of a scorer that has no shards left. A writer that comes in between makes it anew."""
    if not folder.is_dir() or any(p.name != "identity.json" for p in folder.iterdir()):
        return
    (folder / "identity.json").unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        pass
