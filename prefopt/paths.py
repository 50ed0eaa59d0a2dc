"""Where prefopt keeps what it makes once and uses often."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$PREFOPT_CACHE`, else `$XDG_CACHE_HOME/prefopt`, else `~/.cache/prefopt`. Not created here."""
    if path := os.environ.get("PREFOPT_CACHE"):
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "prefopt"


def store_dir() -> Path:
    """`$PREFOPT_STORE`, else `store` in the cache: what was computed once for any run. Not created here."""
    path = os.environ.get("PREFOPT_STORE")
    return Path(path).expanduser() if path else cache_dir() / "store"
