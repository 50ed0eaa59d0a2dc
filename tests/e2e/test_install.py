"""What is installed is complete: a wheel, and an editable install, both used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from prefopt.config.catalogue import conf_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, so that building leaves no trace in it. No network: nothing is isolated or resolved."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("prefopt", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"prefopt/conf/{f.relative_to(ROOT / 'conf').as_posix()}" for f in (ROOT / "conf").rglob("*.yaml")}
    wanted |= {f.relative_to(ROOT).as_posix() for f in (ROOT / "prefopt").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert len(wanted) > 80 and sorted(wanted - inside) == []
    assert not any(name.startswith(("tests/", "scripts/", "conf/")) for name in inside)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in inside)
    entry = zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith("entry_points.txt"))).decode()
    assert "prefopt = prefopt.cli:main" in entry


def elsewhere(tmp_path: Path, path: Path | None, *words: str) -> subprocess.CompletedProcess:
    """`python -m prefopt.cli` from another folder, with `path` in front of what is installed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    cwd = tmp_path / "somewhere"
    cwd.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-m", "prefopt.cli", *words], capture_output=True, text=True, cwd=cwd, env=env)


def test_an_unpacked_wheel_finds_its_configs(wheel, tmp_path):
    """Subprocesses, because this process has imported prefopt from the tree."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "prefopt" / "conf" / "algo" / "only_here.yaml").write_text("# Only in the wheel.\n_target_: prefopt.objectives.pairwise.DPO\n")
    listed = elsewhere(tmp_path, site, "list", "algo")
    assert listed.returncode == 0 and "simpo" in listed.stdout and "only_here" in listed.stdout, listed.stderr
    printed = elsewhere(tmp_path, site, "train", "algo=only_here", "model=bandit", "--cfg", "job")
    assert printed.returncode == 0 and "name: bandit" in printed.stdout, printed.stderr


def test_an_editable_install_finds_its_configs(tmp_path):
    """What the development set-up makes (make setup). A subprocess, because it must start in another folder."""
    listed = elsewhere(tmp_path, None, "list", "algo")
    assert listed.returncode == 0 and all(f.stem in listed.stdout for f in (ROOT / "conf" / "algo").glob("*.yaml")), listed.stderr
    assert conf_dir().resolve() == ROOT / "conf"
