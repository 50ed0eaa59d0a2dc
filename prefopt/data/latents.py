"""Encoded images and captions: computed once, kept in the content-addressed store, read by every run that needs them.

    <store>/latents/<digest of VAE and precision>/    posterior mean and deviation of an image, and what SDXL is told of its size
    <store>/captions/<digest of text encoders>/       embeddings of a caption; each distinct caption once

An image's key is made of its bytes, its operations, and the frame it was brought to (size, crop rule, flip), a caption's of its text.
Latents are fp32 on disk, or fp16 (`data.latents`), never bf16, whose 8 bits would round a latent by up to 0.4 %. Training with everything
stored opens neither VAE nor text encoder.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from prefopt.config.schema import DataConfig
from prefopt.data.pictures import Framing, Part, count_notes, facts, forget, identity, load_picture, name_of, prepare, same
from prefopt.data.records import BadRow, Example
from prefopt.data.shards import Shards
from prefopt.errors import UserError
from prefopt.paths import store_dir

RULE = "cover, middle, lanczos"  # how an image is brought to its frame; another rule needs another name
CHUNK = 64  # images or captions between two looks at what others have done
BATCH = 8  # images in one pass through the VAE
SHARD_BYTES, SHARD_SECONDS = 1 << 26, 30.0  # a shard is written when it has so much, or after so long: what a kill can cost
THREADS = 4  # that decode images
PRECISION = {"fp32": np.float32, "fp16": np.float16}


def _number(*parts: object) -> int:
    """A positive 63-bit number that stands for `parts`."""
    return max(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1, 1)


def _key(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()[:16]


@dataclass(frozen=True)
class Wanted:
    """An image in a frame (h, w), and the row that wants it."""

    part: Part
    frame: tuple[int, int]
    flip: bool
    origin: str


class Encodings:
    """What a policy looks addresses up in. On the CPU; what is in the store is read from there, what was added is in memory.

    `fingerprint`: content hashes of the encoders, `vae` and others. `shape`: of the latents of an image in the square frame, for sampling.
    """

    def __init__(self, framing: Framing, fingerprint: dict[str, str], precision: str = "fp32", shape: tuple[int, ...] | None = None,
                 root: Path | None = None, about: str = ""):
        self.framing, self.precision, self.shape = framing, PRECISION[precision], shape
        texts = {name: value for name, value in fingerprint.items() if name != "vae"}
        root = root or store_dir()
        self.images = Shards(root / "latents", {"vae": fingerprint.get("vae", ""), "precision": precision}, about)
        self.captions = Shards(root / "captions", {"encoders": texts, "precision": precision}, about)
        self.mirrored: dict[int, int] = {}  # address of an image -> address of its mirror image, under data.flip
        self.bad: dict[str, str] = {}  # images that could not be decoded, and why
        self.passed: dict[str, str] = {}  # images of rows that were passed over, and why
        self.counts: Counter[str] = Counter()
        self._frames: dict[tuple[str, ...], set[tuple[int, int]]] = {}
        self._keys: dict[int, bytes] = {}
        self._added: dict[int, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Encodings:
        """A frozen copy of a policy looks into the same book."""
        return self

    # ---- addresses -------------------------------------------------------------------------------

    def image_of(self, part: Part, flip: bool = False) -> int:
        """The address of an image on its own. Raises `BadRow` where it is not encoded, or, with buckets, in more than one shape: then only
        `images_of` its row knows which."""
        if len(self._frames.get(identity(part), ())) > 1:
            raise BadRow(f"{name_of(part)}: it is in several rows, at different sizes; its row must be asked")
        return self._image(part, self._frame([part]), flip)

    def images_of(self, example: Example, flip: bool = False) -> list[int]:
        """The addresses of a row's images: one size and one flip for all. Raises `BadRow`, also for a pair of identical images."""
        sides = [c for c in example.completions if c.picture]
        frame = self._frame([c.picture for c in sides])
        found = [self._image(c.picture, frame, flip) for c in sides]
        if len(found) > 1 and sides[0].text == sides[-1].text:
            first, last = sides[0].picture, sides[-1].picture
            if found[0] == found[-1]:
                raise same(example, first, last)
            if self._alike(found[0], found[-1]):  # one picture in two formats, or an operation that changed nothing
                raise same(example, first, last, "come to the same pixels")
        return found

    def _alike(self, *images: int) -> bool:
        """Whether the latents of two images are equal. Their beginnings are looked at first: reading all of a large store takes long."""
        one, other = (self.images.view(self._keys[image], "mean") for image in images)
        return one.shape == other.shape and np.array_equal(one[0, 0], other[0, 0]) and np.array_equal(one, other)

    def _frame(self, parts: Sequence[Part]) -> tuple[int, int]:
        """The size of a row's images; of some of them, that of the one row that has them."""
        own = self.framing.size(parts)
        known = [self._frames.get(identity(part), set()) for part in parts]
        shared = set.intersection(*known) if known else set()
        return own if own in shared or len(shared) != 1 else shared.pop()

    def caption_of(self, text: str) -> int:
        """The address of a caption. Raises `BadRow` where it is not encoded."""
        address = _number("caption", self.captions.folder.name, text)
        if address not in self._keys and address not in self._added:
            raise BadRow(f"the caption {text[:60]!r} is not encoded")
        return address

    def _image(self, part: Part, frame: tuple[int, int], flip: bool) -> int:
        if reason := self.bad.get(name_of(part)):
            raise BadRow(reason)
        address = self._address(part, frame, flip)
        if address not in self._keys:
            missing = f"{name_of(part)}: it is not encoded at {frame[1]} x {frame[0]} pixels{', mirrored' if flip else ''}"
            raise BadRow(self.passed.get(name_of(part), missing))
        return address

    def _address(self, part: Part, frame: tuple[int, int], flip: bool) -> int:
        return _number("image", self.images.folder.name, _image_key(part, frame, flip))

    # ---- what stands there -----------------------------------------------------------------------

    def latent(self, image: int) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation [C, h, w] of the posterior, fp32, as the network wants them; None where there is no deviation."""
        entry = self._entry(image, self.images)
        std = entry.get("std")
        return _float(entry["mean"]), None if std is None else _float(std)

    def sizes(self, image: int) -> Tensor:
        """[6] fp32: original h and w, top and left of the crop, h and w of the frame (SDXL, arXiv 2307.01952)."""
        sizes = self._entry(image, self.images).get("sizes")
        return self.default_sizes(1)[0] if sizes is None else torch.as_tensor(np.asarray(sizes), dtype=torch.float32)

    def default_sizes(self, count: int) -> Tensor:
        """[count, 6]: of images made at the model's resolution."""
        side = float(self.framing.resolution)
        return torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(count, 1)

    def caption(self, caption: int) -> dict[str, Tensor]:
        """What the text encoders made of a caption, numbers in fp32."""
        return {name: _float(value) for name, value in self._entry(caption, self.captions).items()}

    def add_latent(self, image: int, mean: Tensor, std: Tensor | None = None, sizes: Tensor | None = None) -> None:
        """Puts an image's latents under an address, in memory."""
        entry = {"mean": mean, "std": std, "sizes": sizes}
        self._added[image] = {name: value.detach().cpu() for name, value in entry.items() if value is not None}

    def forget(self, images: Iterable[int]) -> None:
        """Takes latents that were added out of memory."""
        for image in images:
            self._added.pop(image, None)

    def add_caption(self, text: str, tensors: dict[str, Tensor]) -> int:
        """Puts a caption's embeddings under its address, in memory, and returns it."""
        address = _number("caption", self.captions.folder.name, text)
        self._added[address] = {name: value.detach().cpu() for name, value in tensors.items()}
        return address

    def _entry(self, address: int, shards: Shards) -> dict[str, Any]:
        found = self._added.get(address)
        return shards.get(self._keys[address]) if found is None else found

    # ---- filling ---------------------------------------------------------------------------------

    def is_bad(self, what: Wanted | str) -> bool:
        return isinstance(what, Wanted) and name_of(what.part) in self.bad

    def want(self, examples: Iterable[Example]) -> tuple[dict[bytes, Wanted], dict[bytes, str]]:
        """(images, captions) of rows, by key, "" among the captions. Rows that cannot be used are passed over: they are met again, with the
        reason, when their addresses are asked for."""
        images: dict[bytes, Wanted] = {}
        captions = {_key("caption", ""): ""}
        for example in examples:
            captions |= {_key("caption", text): text for text in texts_of(example)}
            parts = [c.picture for c in example.completions if c.picture]
            try:
                frame = self.framing.size(parts)
                count_notes(parts, frame, self.counts)
                for part in parts:
                    self._frames.setdefault(identity(part), set()).add(frame)
                    for flip in (False, True) if self.framing.flip else (False,):
                        images.setdefault(_image_key(part, frame, flip), Wanted(part, frame, flip, example.origin))
            except BadRow as reason:
                self.passed |= {name_of(part): str(reason) for part in parts}
        return images, captions

    def found(self, images: dict[bytes, Wanted], captions: dict[bytes, str]) -> None:
        """Makes known under their addresses what is in the store."""
        for key, text in captions.items():
            if key in self.captions:
                self.captions.use(key)
                self._keys[_number("caption", self.captions.folder.name, text)] = key
        for key, of in images.items():
            if key in self.images:
                self.images.use(key)
                address = self._address(of.part, of.frame, of.flip)
                self._keys[address] = key
                if of.flip:
                    self.mirrored[self._address(of.part, of.frame, False)] = address


def texts_of(example: Example) -> list[str]:
    """The captions of a row: its own, and those that its images have instead."""
    return [example.prompt_text, *(c.text for c in example.completions if c.picture and c.text.strip())]


def _image_key(part: Part, frame: tuple[int, int], flip: bool) -> bytes:
    return _key("image", RULE, identity(part), frame, flip)


def _float(value: Any) -> Tensor:
    made = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    return made.float() if made.is_floating_point() else made


def encode(examples: Sequence[Example], cfg: DataConfig, resolution: int, open_encoders: Callable[[], Any], *,
           fingerprint: dict[str, str] | None = None, shape: tuple[int, ...] | None = None, rank: int = 0, world: int = 1,
           wait: Callable[[], None] = lambda: None, root: Path | None = None, about: str = "") -> Encodings:
    """Encodes what the store lacks of the images and captions of `examples`, for a model that works at `resolution`.

    `open_encoders` is called for the `fingerprint` if none is given, and if something is missing; what it gives has `latents(pixels)`,
    `captions(texts)`, `fingerprint` and perhaps `free()`. Each of `world` processes takes its share and `wait`s for the others. Several
    runs may fill one store: each looks again before every chunk, and begins at another place. Raises `UserError` for latents or embeddings
    that are not finite, and where the disk has no room; images that cannot be read are bad rows, told when they are asked for.
    """
    made: list[Any] = []

    def encoders() -> Any:
        if not made:
            made.append(open_encoders())
        return made[0]

    out = Encodings(Framing.of(cfg, resolution), fingerprint or encoders().fingerprint, cfg.latents, shape, root, about)
    if world > 1:  # hashing all images takes a while, too
        for example in _share(list(examples), rank, world):
            for part in (c.picture for c in example.completions if c.picture):
                with suppress(BadRow):
                    facts(part)
        wait()
        forget()
    images, captions = out.want(examples)
    out.images.refresh()
    out.captions.refresh()
    there = sum(key in out.images for key in images), sum(key in out.captions for key in captions)
    try:
        for shards, wanted, entries, unit in ((out.images, images, _latents, "images"), (out.captions, captions, _embeddings, "captions")):
            _fill(out, shards, wanted, entries, encoders, unit, rank, world)
            wait()
            shards.refresh()
            left = {key: what for key, what in wanted.items() if key not in shards and not out.is_bad(what)}
            if left:  # what another process could not read
                _fill(out, shards, left, entries, encoders, unit)
            if made and hasattr(made[0], "free"):
                made[0].free()
    finally:
        out.found(images, captions)
        out.images.touch()
        out.captions.touch()
    if rank == 0:
        _tell(out, len(images), len(captions), there)
    return out


def patient(world: int) -> Callable[[], None]:
    """Waits until all of `world` processes have come, however long that takes: a GPU's collectives give up after ten minutes, and one
    process may have more to encode than that. If one dies, its launcher ends the others."""
    if world == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return lambda: dist.barrier(group)


def _share(items: list[Any], rank: int, world: int) -> list[Any]:
    """A process's part, in one piece: neighbours often lie in one file."""
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def _fill(out: Encodings, shards: Shards, wanted: dict[bytes, Any], entries: Callable[..., Iterator[tuple[bytes, dict]]],
          encoders: Callable[[], Any], unit: str, rank: int = 0, world: int = 1) -> None:
    """Writes this process's share of what `shards` lack of `wanted`."""
    items = list(wanted.items())
    chunks = _share([items[i : i + CHUNK] for i in range(0, len(items), CHUNK)], rank, world)
    lacking = sum(key not in shards for chunk in chunks for key, _ in chunk)
    if not lacking:
        return
    first = random.SystemRandom().randrange(len(chunks))
    kept: dict[bytes, dict[str, np.ndarray]] = {}
    since, told, size = time.monotonic(), False, 0
    with tqdm(desc=f"encoding {unit}", unit=f" {unit}", total=lacking, file=sys.stderr, disable=rank > 0,
              mininterval=0.1 if sys.stderr.isatty() else 5.0) as bar:
        for chunk in chunks[first:] + chunks[:first]:
            shards.refresh()
            todo = {key: what for key, what in chunk if key not in shards and key not in kept}
            for key, entry in entries(out, todo, encoders) if todo else ():
                kept[key] = entry
                size += sum(array.nbytes for array in entry.values())
                bar.update()
            if kept and not told:
                told = True
                _room(shards, size / len(kept) * lacking, lacking, unit, world, rank)
            if size > SHARD_BYTES or time.monotonic() - since > SHARD_SECONDS:
                shards.add(kept)
                kept, size, since = {}, 0, time.monotonic()
        shards.add(kept)


def _room(shards: Shards, needed: float, count: int, unit: str, world: int, rank: int) -> None:
    """Says how much will be written, and refuses what the disk cannot hold."""
    place = next(folder for folder in (shards.folder, *shards.folder.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if rank == 0:
        tqdm.write(f"encoding {count * world:,} {unit}: about {_gb(needed * world)} in {shards.folder}", sys.stderr)
    if needed * world > free:
        raise UserError(f"the encoded {unit} take about {_gb(needed * world)}, and {place} has {_gb(free)} left; set PREFOPT_STORE to a "
                        "folder with more room, make some (prefopt store gc), or set data.latents=fp16 or a data.limit")


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _latents(out: Encodings, todo: dict[bytes, Wanted], encoders: Callable[[], Any]) -> Iterator[tuple[bytes, dict[str, np.ndarray]]]:
    def load(item: tuple[bytes, Wanted]) -> Any:
        key, of = item
        try:
            return key, of, *prepare(load_picture(of.part), of.frame, of.flip)
        except BadRow as reason:
            out.bad[name_of(of.part)] = str(reason)
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        loaded = [one for one in pool.map(load, todo.items()) if one]
    by_frame: dict[tuple[int, int], list[Any]] = {}
    for one in loaded:
        by_frame.setdefault(one[1].frame, []).append(one)
    for group in by_frame.values():
        for i in range(0, len(group), BATCH):
            batch = group[i : i + BATCH]
            try:
                mean, std = encoders().latents(torch.stack([pixels for _, _, pixels, _ in batch]))
            except UserError as error:
                if (place := getattr(error, "place", None)) is None:
                    raise
                raise _not_finite(batch[place][1], "") from error
            for (key, of, _, about), m, s in zip(batch, mean.float().cpu().numpy(), std.float().cpu().numpy(), strict=True):
                if not (np.isfinite(m).all() and np.isfinite(s).all()):
                    raise _not_finite(of, "")
                entry = {"mean": m, **({"std": s} if s.any() else {})}
                entry = {name: _rounded(array, out.precision) for name, array in entry.items()}
                if not all(np.isfinite(array).all() for array in entry.values()):
                    raise _not_finite(of, " in fp16; set data.latents=fp32")
                yield key, {**entry, "sizes": np.array([*about, *of.frame], dtype=np.int32)}


def _rounded(array: np.ndarray, precision: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return array.astype(precision)


def _not_finite(of: Wanted, fix: str) -> UserError:
    return UserError(f"{of.origin}: the VAE makes NaN or infinity of {name_of(of.part)}{fix or '; is the image damaged, or the VAE?'}")


def _embeddings(out: Encodings, todo: dict[bytes, str], encoders: Callable[[], Any]) -> Iterator[tuple[bytes, dict[str, np.ndarray]]]:
    for (key, text), made in zip(todo.items(), encoders().captions(list(todo.values())), strict=True):
        entry = {}
        for name, value in made.items():
            value = value.detach().cpu()
            entry[name] = _rounded(value.float().numpy(), out.precision) if value.is_floating_point() else value.numpy()
            if not np.isfinite(entry[name]).all():
                fix = " in fp16; set data.latents=fp32" if out.precision is np.float16 else "; is the text encoder damaged?"
                raise UserError(f"the text encoders make NaN or infinity of the caption {text[:60]!r}{fix}")
        yield key, entry


def _tell(out: Encodings, images: int, captions: int, there: tuple[int, int]) -> None:
    notes = [f"{count:,} {what}" for what, count in out.counts.items() if count]
    if out.bad:
        notes.append(f"{len(out.bad)} not readable")
    print(f"images: {images:,} ({there[0]:,} were stored), captions: {captions:,} ({there[1]:,} were stored)"
          + (f"; {', '.join(notes)}" if notes else ""), file=sys.stderr)
