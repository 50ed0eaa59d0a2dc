"""Take secrets out of what is about to be written: configs, manifests, command lines."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from typing import Any

REDACTED = "<redacted>"

_SECRET_WORDS = {
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials",
    "apikey", "authorization", "bearer", "cookie",
}  # fmt: skip
_KEY_OWNERS = {"api", "access", "private", "secret", "auth", "account", "license"}
# A tokenizer's special tokens carry the same word and are no secret.
_TEXT_TOKENS = {
    "pad", "eos", "bos", "unk", "mask", "sep", "cls", "image", "video", "audio", "stop", "start", "end",
    "begin", "special", "think", "boi", "eoi", "per", "placeholder", "response", "prompt", "first", "last",
}  # fmt: skip
# 40 hexadecimal digits are a W&B key, unless the name says they are a content hash.
_HASH_WORDS = {"revision", "commit", "sha", "sha1", "hash", "git", "digest", "head", "checksum", "oid"}
_HASH_WORDS |= {"revisions", "commits", "hashes", "parents"}

_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_|api_org_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[a-z]-|wandb_v1_)"
    r"[A-Za-z0-9_\-]{12,}"
    r"|(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}"
    r"|(?<![A-Za-z0-9])AIza[0-9A-Za-z_\-]{30,}"
    r"|(?<![A-Za-z0-9])eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]+"  # a JSON web token
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"  # the user:password of a URL
)
# After '/' or '@' it is part of a path or `repo@commit`.
_HEX40 = re.compile(r"(?<![\w/@.\-])[0-9a-f]{40}(?!\w)")
# `name=value`, `name: value` and `"name": "value"` inside a string: an override, a header, JSON.
_NAME = re.compile(r"([\w.+~\-]+)[\"']?\s*[:=]\s*")
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|(?:(?:Bearer|Basic)\s+)?[^\s,&{}\[\]()\"']+")
# A word of a vocabulary (<|end|>, [SEP], ####) or an interpolation that is not resolved: no access token.
_NOT_ACCESS = re.compile(r"<.*>|\[.*\]|\$\{.*\}|[^\w]*")


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[a-z0-9]+", spaced.lower())


def is_secret_name(name: str) -> bool:
    """Whether a value under this name is a secret: `hf_token`, `apiKey`, `DB_PASSWORD`; not `pad_token`."""
    words = _words(name)
    if _SECRET_WORDS & set(words):
        return True
    if any(a in _KEY_OWNERS and b in ("key", "keys") for a, b in pairwise(words)):
        return True
    if words[-1:] == ["token"]:
        return not (len(words) > 1 and words[-2] in _TEXT_TOKENS)
    return False


def redact(value: Any, name: str = "") -> Any:
    """A copy made of plain dicts, lists and scalars, without the secrets.

    Removed are values whose name says secret, strings which look like access tokens, and the values that
    secret-named environment variables hold now, wherever they appear.
    """
    known = {v for k, v in os.environ.items() if len(v) >= 8 and is_secret_name(k) and k not in ("PWD", "OLDPWD")}
    return _redact(value, name, sorted(known, key=len, reverse=True))


def _redact(value: Any, name: str, known: list[str]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if name and is_secret_name(name) and not _harmless(name, value):
        return REDACTED
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return {_text(str(k), "", known): _redact(v, str(k), known) for k, v in value.items()}
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        return _items(list(value), name, known)
    return _text(str(value), name, known)


def _harmless(name: str, value: Any) -> bool:
    if _words(name)[-1] != "token":
        return value == ""  # even a number under the name of a password is one
    return isinstance(value, (int, float)) or (isinstance(value, str) and bool(_NOT_ACCESS.fullmatch(value)))


def _items(items: list, name: str, known: list[str]) -> list:
    out = []
    for before, item in pairwise([None, *items]):
        # A command line may give the value as a word of its own: `--token abc`.
        flag = isinstance(before, str) and before.startswith("-") and "=" not in before
        out.append(_redact(item, before if flag else name, known))
    return out


def _text(text: str, name: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    text = _assignments(text)
    text = _TOKEN.sub(REDACTED, text)
    return _HEX40.sub(lambda m: m[0] if _names_hash(text, m.start(), name) else REDACTED, text)


def _assignments(text: str) -> str:
    out, done = [], 0
    for name in _NAME.finditer(text):
        if name.start() < done or not is_secret_name(name[1]):
            continue
        if value := _VALUE.match(text, name.end()):
            out += [text[done : name.end()], REDACTED]
            done = value.end()
    return "".join(out) + text[done:]


def _names_hash(text: str, start: int, name: str) -> bool:
    """Whether the digits at `start` are called a revision: by their name, or as in `model.revision=...`."""
    if own := re.search(r"([\w.\-]+)=['\"]?$", text[:start]):
        name = own[1]
    return bool(_HASH_WORDS & set(_words(name)))
