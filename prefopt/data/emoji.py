"""data=emoji: Twemoji's drawings of 64 pixels with their names as captions, from the npm package emoji-datasource-twitter.

The package is MIT, the artwork is by Twitter and other contributors under CC-BY-4.0: name them where you show it. 3,786 images: 1,911
names, and people in five skin tones. A name with all its skin tones is either for training or held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.paths import cache_dir

VERSION = "16.0.0"
URL = f"https://registry.npmjs.org/emoji-datasource-twitter/-/emoji-datasource-twitter-{VERSION}.tgz"
SHA512 = "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b5465378a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d"
IMAGES = "img/twitter/64"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def rows(path: str | None, held_out: float) -> tuple[Iterator[tuple[str, dict[str, Any]]], Iterator[tuple[str, dict[str, Any]]]]:
    """(training, held-out) demonstrations: the name as caption, the drawing as image. `path` is the package's folder; None: it is fetched
    once into the cache. `held_out` is the share of names that are."""
    folder = Path(path).expanduser() if path else ensure()
    try:
        known = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path={folder}: it holds no readable emoji.json; give the folder of the unpacked npm package "
                        "emoji-datasource-twitter, or data.path=null to have it fetched") from error

    def apart(of: dict[str, Any]) -> bool:
        return int.from_bytes(hashlib.sha256(str(of["name"]).encode()).digest()[:4], "big") < held_out * 2**32

    def demonstrations(split: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        for of in known:
            if apart(of) == split:
                for caption, image in _drawings(of):
                    yield f"emoji {image}", {"prompt": caption, "completion": {"image": os.path.abspath(folder / IMAGES / image)}}

    return demonstrations(False), demonstrations(True)


def _drawings(of: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(caption, file name) of an emoji and of its skin tones."""
    name = of["name"] if of["category"] == "Flags" else of["name"].lower()
    if of["has_img_twitter"]:
        yield name, of["image"]
    for tones, one in of.get("skin_variations", {}).items():
        if one["has_img_twitter"]:
            said = list(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            yield f"{name}, {' and '.join(said)} skin tone{'s' * (len(said) > 1)}", one["image"]


def ensure() -> Path:
    """The package's folder in the cache, fetched and checked if it is not there. Raises `UserError` without a network."""
    target = cache_dir() / "emoji" / VERSION
    if (target / "emoji.json").is_file():
        return target
    print(f"fetching {URL} (62 MB; artwork: Twemoji, CC-BY-4.0)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    try:
        archive = part / "package.tgz"
        try:
            with urllib.request.urlopen(URL, timeout=60) as source, open(archive, "wb") as copy:
                shutil.copyfileobj(source, copy)
        except (OSError, urllib.error.URLError) as error:
            raise UserError(f"data=emoji: {URL} cannot be fetched ({getattr(error, 'reason', error)}). On a machine with a network run "
                            f"`npm pack emoji-datasource-twitter@{VERSION}`, unpack it, and set data.path=FOLDER/package") from error
        unpack(archive, part / "files")
        try:
            (part / "files").rename(target)
        except OSError:  # another process was faster
            if not (target / "emoji.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def unpack(archive: Path, to: Path) -> None:
    """The names and the small images of the package; the sheets, which are most of it, are left out."""
    with open(archive, "rb") as stream:
        found = hashlib.file_digest(stream, "sha512").hexdigest()
    if found != SHA512:
        raise UserError(f"data=emoji: what came from {URL} is not version {VERSION} of the package (sha512 {found[:16]}...); repeat the "
                        "command, or set data.path=FOLDER")
    (to / IMAGES).mkdir(parents=True)
    with tarfile.open(archive) as package:
        for member in package:
            name = member.name.removeprefix("package/")
            if member.isfile() and (name in ("emoji.json", "LICENSE", "README.md") or Path(name).parent.as_posix() == IMAGES):
                (to / name).write_bytes(package.extractfile(member).read())
