"""Which tests check which method, read from the tests themselves: the table of checks in docs/algorithms.md.

The standard tests are imported and asked for their parameters, so a method that a test leaves out is not said to pass it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from prefopt.config import catalogue

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# Heading -> the test module and the tests in it (empty: any) that check every method by registration.
STANDARD: dict[str, tuple[str, tuple[str, ...]]] = {
    "formula": ("test_formulas", ("test_terms_equal_the_formula",)),
    "golden": ("test_formulas", ("test_golden_number",)),
    "limits": ("test_formulas", ("test_limit",)),
    "gradient": ("test_gradients", ()),
    "splits": ("test_splits", ()),
    "fast path": ("test_fast_path", ()),
    "reward rises": ("test_bandit_optima", ()),
}
COLUMNS = (*STANDARD, "optimum", "TRL", "own tests")
PARITY = ("test_trl_parity.py", "test_trl_trainers.py")
OPTIMUM = ("optimum", "reaches_the_", "reaches_its_", "finds_the_")  # in the names of tests that compare with an optimum in closed form
CONTRAST = ("cdpo",)  # trained in such a test to show that it goes elsewhere


@cache
def _methods() -> tuple[str, ...]:
    return tuple(catalogue.groups()["algo"])


def checks(name: str) -> dict[str, str]:
    """For a method or another published system: heading -> what checks it, empty where nothing does."""
    own = own_tests(name)
    found = {heading: "yes" if name in parameters(*where) else "" for heading, where in STANDARD.items()}
    found["optimum"] = "yes" if name not in CONTRAST and any(word in test for _, test in own for word in OPTIMUM) else ""
    beside = {cls for file in PARITY for cls in imported(TESTS / "objectives" / file)}
    found["TRL"] = "yes" if name in _methods() and catalogue.algo_info(name).name in beside else ""
    found["own tests"] = ", ".join(sorted({file.stem.removeprefix("test_") for file, _ in own}))
    return found


@cache
def parameters(module: str, tests: tuple[str, ...] = ()) -> set[str]:
    """Values of the parameter `slug` of a module's tests."""
    loaded = _load(module)
    chosen = [getattr(loaded, test) for test in tests] or [f for test, f in vars(loaded).items() if test.startswith("test_")]
    return {slug for function in chosen for slug in _slugs(function)}


def _slugs(function: object) -> set[str]:
    found = set()
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize":
            names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else list(mark.args[0])
            for given in mark.args[1] if "slug" in names else ():
                values = getattr(given, "values", [given] if len(names) == 1 else given)
                found.add(values[names.index("slug")])
    return found


@cache
def _load(module: str) -> ModuleType:
    for folder in (ROOT, TESTS / "objectives"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(module)


@cache
def imported(file: Path) -> frozenset[str]:
    """Objectives that a test file imports by name."""
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
    return frozenset(alias.name for n in nodes if n.module.startswith("prefopt.objectives.") for alias in n.names)


@cache
def own_tests(name: str) -> list[tuple[Path, str]]:
    """(file, test) of the tests that name it: in tests/objectives beside the standard ones, or elsewhere if there is none there."""
    wanted = {name, _class(name)} - {""}
    near = [file for file in _files() if file.parent.name == "objectives"]
    standard = {f"{module}.py" for module, tests in STANDARD.values() if module != "test_bandit_optima"} | set(PARITY)
    for files in ([f for f in near if f.name not in standard], [f for f in _files() if f not in near]):
        if found := [(file, test) for file in files for test, words in _words(file) if words & wanted]:
            return found
    return []


@cache
def _files() -> tuple[Path, ...]:
    """Test files that may be about a method: those about listings and texts are not."""
    texts = {"test_catalogue.py", "test_completion.py", "test_compose.py", "test_docstrings.py", "test_extending.py"}
    return tuple(sorted(file for file in TESTS.rglob("test_*.py") if file.parent.name != "gpu" and file.name not in texts))


@cache
def _words(file: Path) -> list[tuple[str, frozenset[str]]]:
    """(test, names and words of its text constants) of a file; what helpers and tables name counts for the tests that use them."""
    tree = ast.parse(file.read_text())
    used: dict[str, set[str]] = {}
    for node in tree.body:
        targets = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        words |= {word for text in texts if len(text) < 60 for word in text.replace("=", " ").replace("/", " ").split()}
        used |= {target: words for target in targets}
    for _ in range(2):  # helpers of helpers
        used = {name: words | {w for other in words & used.keys() for w in used[other]} for name, words in used.items()}
    return [(name, frozenset(words)) for name, words in used.items() if name.startswith("test_")]


def _class(name: str) -> str:
    """Its class, if tests of the class are tests of it: not where other settings of the class have the name."""
    info = catalogue.algo_info(name) if name in _methods() else None
    return info.name if info and catalogue.summary(name) == info.summary else ""
