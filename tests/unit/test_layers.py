"""Imports point one way, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import prefopt

PACKAGE = Path(prefopt.__file__).parent
# A part may import itself and what stands after it. `config`, `errors` and `paths` lie below everything.
ORDER = "cli launch evaluation training report tracking rewards policies data objectives config errors paths".split()
# launch.worker ends as the command line does, so it uses the same guard.
ALLOWED = {("launch/worker.py", "cli")}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return {n.split(".")[1] for n in found if n.startswith("prefopt.") and n.split(".")[1] in ORDER}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    place = file.relative_to(PACKAGE)
    part = place.parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imports(file)
        return
    wrong = {i for i in imports(file) if ORDER.index(i) < ORDER.index(part) and (place.as_posix(), i) not in ALLOWED}
    assert not wrong, f"{place} imports {wrong}, which stand above {part}"
    if part == "objectives":
        assert imports(file) <= {"objectives"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_under_five_hundred_lines(file):
    assert len(file.read_text().splitlines()) <= 500


def test_the_loop_fits_on_one_screen():
    tree = ast.parse((PACKAGE / "training" / "loop.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno < 45
