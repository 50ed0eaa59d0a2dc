"""Content-addressed folders of tensors: what was computed once for any run, kept in files that never change.

    <root>/<digest of an identity>/identity.json             what the entries are, for people
    <root>/<digest of an identity>/<sha256>.safetensors      shards; the name is the sha256 of the content

A shard is written under a temporary name, to the disk, then renamed: there is never half a file under a name that is read, readers need no
lock, and writers cannot harm each other. Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from prefopt.errors import UserError

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}


def digest_of(identity: Mapping[str, Any]) -> str:
    """The folder's name: 32 hex digits of the identity's sha256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def damaged(path: Path, content: bytes | None = None) -> bool:
    """Whether a shard's content does not match its name."""
    if content is not None:
        return hashlib.sha256(content).hexdigest() != path.stem
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() != path.stem


def write_aside(path: Path, content: bytes) -> None:
    """Under a temporary name, to the disk, then renamed: there is never half a file under a name that is read."""
    for attempt in range(3):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            with open(part, "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
            break
        except FileNotFoundError:  # the folder was empty, and was taken away in between
            if attempt == 2:
                raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:  # not every file system can
        pass
    finally:
        os.close(folder)


class Shards:
    """Entries of one identity: a key of 16 bytes -> named arrays. All entries of a shard have the same names and shapes, so a shard holds
    `keys` [n, 16] and, for each name, the arrays of its n entries. Entries are read from disk when they are asked for."""

    def __init__(self, root: Path, identity: Mapping[str, Any], about: str = ""):
        self.identity, self.about = dict(identity), about
        self.folder = root / digest_of(identity)
        self.places: dict[bytes, tuple[Path, int]] = {}
        self.seen: dict[Path, dict[str, np.ndarray]] = {}  # shard -> its arrays, mapped
        self.used: set[Path] = set()

    def refresh(self) -> None:
        """Looks for shards that were not there before. Raises `UserError` for one that is cut off."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self.seen:
                try:
                    self._take(path)
                except FileNotFoundError:  # somebody else made room since
                    continue

    def _take(self, path: Path) -> None:
        arrays = self.seen[path] = _mapped(path)
        for row, key in enumerate(arrays["keys"]):
            self.places.setdefault(key.tobytes(), (path, row))

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def view(self, key: bytes, name: str) -> np.ndarray:
        """One array of an entry, mapped: what is not looked at is not read. Raises `KeyError`."""
        path, row = self.places[key]
        return self.seen[path][name][row]

    def get(self, key: bytes) -> dict[str, np.ndarray]:
        """A copy of an entry. Raises `KeyError`."""
        path, row = self.places[key]
        return {name: np.array(array[row]) for name, array in self.seen[path].items() if name != "keys"}

    def use(self, key: bytes) -> None:
        """Notes that an entry will be read, for `touch`."""
        self.used.add(self.places[key][0])

    def add(self, entries: Mapping[bytes, Mapping[str, np.ndarray]]) -> None:
        """Writes one shard for each shape that there is."""
        by_shape: dict[Any, list[bytes]] = {}
        for key in sorted(entries):  # the same entries make the same file
            by_shape.setdefault(tuple((n, a.shape, a.dtype.str) for n, a in sorted(entries[key].items())), []).append(key)
        for shape, keys in by_shape.items():
            # safetensors writes memory as it lies: what a VAE makes may lie channels last.
            arrays = {name: np.ascontiguousarray(np.stack([entries[key][name] for key in keys])) for name, *_ in shape}
            content = save({"keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16), **arrays})
            path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
            try:
                known = self.folder / "identity.json"
                if not known.is_file():
                    write_aside(known, json.dumps({"model": self.about, "identity": self.identity}, indent=2).encode())
                write_aside(path, content)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    raise
                raise UserError(f"{self.folder} cannot be written ({error.strerror}); set PREFOPT_STORE to a folder that can") from error
            self.used.add(path)
            if path not in self.seen:
                self._take(path)

    def touch(self) -> None:
        """Marks the shards in use as such, for eviction by least recent use."""
        for path in self.used:
            try:
                os.utime(path)
            except OSError:  # evicted meanwhile, or somebody else's: what is mapped stays readable
                pass


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped and not read."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(begin - 8))
        out = {}
        for name, about in header.items():
            if name != "__metadata__":
                low, high = about["data_offsets"]
                if begin + high > size:
                    raise ValueError("cut off")
                dtype, shape = np.dtype(DTYPES[about["dtype"]]), tuple(about["shape"])
                out[name] = np.memmap(path, dtype, "r", begin + low, shape) if high > low else np.zeros(shape, dtype)
        return {"keys": np.array(out.pop("keys")), **out}
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is damaged; `prefopt store gc` removes damaged shards, whose entries are then computed again") from error
