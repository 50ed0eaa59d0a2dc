"""`prefopt doctor`: is this machine ready? Versions, devices, folders, keys. Imports no torch, uses no network."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from prefopt.errors import UserError
from prefopt.paths import cache_dir

OPTIONAL = {
    "deepspeed": "",
    "bitsandbytes": ", for adapter=qlora",
    "flash-attn": ", for model.attention=flash_attention_2",
    "vllm": "",
    "tensorboard": ", for tracker=tensorboard",
    "trl": ", for tests that compare with it",
}
GIB = 1 << 30
Line = tuple[str, str, str]  # ok, note or problem; what it is about; what was found


def require_bitsandbytes() -> None:
    """Raises `UserError` if the package of `model.quantize=4bit` is not there. Does not import it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('model.quantize=4bit needs the package bitsandbytes; pip install "prefopt[qlora]", or use adapter=lora')


def doctor_text() -> tuple[str, bool]:
    """The report, and whether it is free of problems."""
    lines = [*_machine(), *_packages(), *_devices(), *_folders(), *_accounts()]
    width = max(len(what) for _, what, _ in lines) + 2
    text = [f"{level.ljust(8)} {what.ljust(width)}{found}" for level, what, found in lines]
    problems = sum(level == "problem" for level, _, _ in lines)
    text += ["", "ready" if not problems else f"{problems} problem{'s' * (problems > 1)} to mend"]
    return "\n".join(text), not problems


def _machine() -> Iterator[Line]:
    version = platform.python_version()
    try:
        wanted = metadata.metadata("prefopt").get("Requires-Python") or ""
    except metadata.PackageNotFoundError:
        wanted = ""
    if _satisfies(version, wanted):
        yield "ok", "python", f"{version} ({sys.executable})"
    else:
        yield "problem", "python", f"{version}, prefopt needs {wanted}; make an environment with a newer Python"
    yield "ok", "platform", f"{platform.system()} {platform.release()}, {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "ok", "cores", str(cores)
    if memory := _memory():
        total, free = memory
        found = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
        if free < 2 * GIB:
            yield "note", "memory", f"{found}; even model=tiny-lm wants about 2 GiB, so close something"
        else:
            yield "ok", "memory", found


def _memory() -> tuple[int, int] | None:
    """Total and available bytes: the machine's, or the container's where that is less. None if unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
        keys = ("MemTotal", "MemAvailable")
        total, free = (int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1]) * 1024 for key in keys)
    except (OSError, TypeError):
        try:
            total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (OSError, ValueError, AttributeError):
            return None
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        try:
            cap, current = int(limit.read_text()), int(used.read_text())
        except (OSError, ValueError):  # no such file, or the word max
            continue
        if cap < total:
            total, free = cap, min(free, max(cap - current, 0))
    return total, free


def _packages() -> Iterator[Line]:
    try:
        requirements = metadata.requires("prefopt") or []
        yield "ok", "prefopt", metadata.version("prefopt")
    except metadata.PackageNotFoundError:
        requirements = []
        yield "problem", "prefopt", "not installed; run pip install -e . in its source folder"
    for requirement in requirements:
        text, _, marker = requirement.partition(";")
        match = re.match(r"\s*([\w.-]+)(?:\[[^]]*\])?\s*\(?([^)]*)\)?", text)
        if marker or not match:  # an extra, or a package for another platform
            continue
        name, wanted = match[1], match[2].strip()
        found = _version(name)
        if found is None:
            yield "problem", name, f'missing; pip install "{name}{wanted}"'
        elif not _satisfies(found, wanted):
            yield "problem", name, f'{found}, prefopt needs {wanted}; pip install "{name}{wanted}"'
        else:
            yield "ok", name, found
    for name, purpose in OPTIONAL.items():
        found = _version(name)
        yield ("ok" if found else "note"), name, f"{found or 'not installed'} (optional{purpose})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, wanted: str) -> bool:
    """Whether `version` is in a range such as `>=1.3.2,<1.4`. Compares release numbers only."""
    tests = {
        ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b, ">": lambda a, b: a > b, "<": lambda a, b: a < b,
        "~=": lambda a, b: a >= b and a[: len(b) - 1] == b[:-1],
    }  # fmt: skip
    for sign, bound in re.findall(r"(>=|<=|==|!=|~=|>|<)\s*([\d.]+)", wanted):
        have, limit = _numbers(version), _numbers(bound)
        width = max(len(have), len(limit))
        if sign != "~=":
            limit += (0,) * (width - len(limit))
        if not tests[sign](have + (0,) * (width - len(have)), limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in release[1].split(".")) if release else ()


def torch_build() -> str | None:
    """cpu, cuda 12.8, rocm 6.4, or what torch's own version file says; None if there is no torch."""
    version = _version("torch")
    if version is None:
        return None
    label = version.partition("+")[2]
    if label.startswith("cpu"):
        return "cpu"
    if match := re.match(r"cu(\d+)(\d)$", label):
        return f"cuda {match[1]}.{match[2]}"
    if label.startswith("rocm"):
        return f"rocm {label[4:]}"
    spec = importlib.util.find_spec("torch")  # wheels of PyPI carry no label
    try:
        text = (Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
    except OSError:
        text = ""
    for kind, key in (("cuda", "cuda"), ("rocm", "hip")):
        if match := re.search(rf"^{key}\b[^=\n]*=\s*['\"]([\d.]+)", text, re.M):
            return f"{kind} {match[1]}"
    return "cpu"


def _devices() -> Iterator[Line]:
    build, gpus = torch_build(), _gpus()
    if build is None:
        yield "note", "torch build", "unknown until torch is installed"
    elif gpus and build == "cpu":
        fix = "pip uninstall torch, then install a CUDA build (pytorch.org/get-started)"
        yield "problem", "torch build", f"for the CPU, but this machine has a GPU; {fix}"
    elif not gpus and build.startswith("cuda"):
        yield "note", "torch build", f"{build}, but no GPU was found; it works on the CPU, a CPU build is smaller"
    else:
        yield "ok", "torch build", build
    if isinstance(gpus, str):
        yield "problem", "gpu", gpus
    for number, gpu in enumerate(gpus if isinstance(gpus, list) else []):
        yield "ok", f"gpu {number}", gpu
    if not gpus:
        yield "note", "gpu", "none found; hardware=auto takes the CPU"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and gpus:
        yield "note", "CUDA_VISIBLE_DEVICES", f"{visible or 'empty: no GPU will be used'}"


def _gpus() -> list[str] | str:
    """Name, memory and driver of each NVIDIA GPU; a sentence if the driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=2)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer within 2 s; run it by hand, the driver may hang"
    except OSError as error:
        return f"nvidia-smi cannot be run ({error.strerror}); mend the driver, or remove it from PATH"
    if done.returncode and "no devices" not in (done.stdout + done.stderr).lower():
        first = next(iter((done.stdout + done.stderr).strip().splitlines()), f"exit code {done.returncode}")
        return f"nvidia-smi fails: {first}; mend the driver"
    if done.returncode:
        return []
    rows = [line.strip().rpartition(", ") for line in done.stdout.splitlines() if line.strip()]
    return [f"{name}, driver {driver}" for name, _, driver in rows]


def _folders() -> Iterator[Line]:
    cache = cache_dir()
    for what, folder, fix in (
        ("cache folder", cache, "set PREFOPT_CACHE to a folder you may write to"),
        ("current folder", Path.cwd(), "go to a folder you may write to, or set hydra.run.dir"),
    ):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield "problem", what, f"{folder} cannot be written; {fix}"
            continue
        free = shutil.disk_usage(there).free
        found = f"{folder}, {free / GIB:.1f} GiB free"
        if free < GIB:
            yield "problem", what, f"{found}; too little for checkpoints, free some space or {fix}"
        elif free < 20 * GIB:
            yield "note", what, f"{found}; enough for small models, an 8B checkpoint takes 16 GiB and more"
        else:
            yield "ok", what, found
    made = any((folder / "config.json").is_file() for folder in cache.glob("tiny-lm-*"))
    yield ("ok", "tiny-lm", "made") if made else ("note", "tiny-lm", "not made yet; its first use takes about a minute")


def _accounts() -> Iterator[Line]:
    """Whether keys are there, never what they are."""
    if os.environ.get("WANDB_API_KEY"):
        yield "ok", "W&B key", "set by WANDB_API_KEY"
    elif file := _netrc_file():
        yield "ok", "W&B key", f"in {file}"
    else:
        yield "note", "W&B key", "none; run wandb login, or use tracker=wandb-offline (tracker=none is the default)"
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    token = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    if name:
        yield "ok", "HF token", f"set by {name}"
    elif token.is_file() and token.stat().st_size:
        yield "ok", "HF token", f"in {token}"
    else:
        yield "note", "HF token", "none; gated models (Llama) need one: hf auth login"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield "note", "HF_HUB_OFFLINE", "set: only models and data that are here already; unset it to download"


def _netrc_file() -> Path | None:
    """The netrc file with a login for the W&B server, if there is one."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in names):
        try:
            if host in netrc.netrc(file).hosts:
                return file
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
    return None
