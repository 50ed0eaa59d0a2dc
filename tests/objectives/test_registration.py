"""What every registered objective owes: two small files that agree, rules that are enforced, and no import but torch."""

import ast
import importlib
import inspect
import itertools
import re
import sys
from dataclasses import fields

import pytest
from samples import ROOT, YAML, default, settings_of

from prefopt.objectives.base import PER_TOKEN, SHAPES, VIEWS, Objective, holds
from prefopt.policies.divergence import KINDS

SOURCES = sorted((ROOT / "prefopt" / "objectives").glob("*.py"))
RULES = [(slug, rule) for slug in YAML for rule in settings_of(slug)[0].require]


def class_node(cls: type) -> ast.ClassDef:
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)


def concrete() -> list[type]:
    """Every objective class with an equation of its own."""
    found = []
    for path in SOURCES:
        module = importlib.import_module(f"prefopt.objectives.{path.stem}" if path.stem != "__init__" else "prefopt.objectives")
        found += [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Objective) and c.__module__ == module.__name__]
    return [c for c in found if "formula" in vars(c) and c is not Objective]


def test_every_class_has_a_yaml():
    named, own = {settings_of(slug)[0] for slug in YAML}, {c.__name__ for c in concrete()}
    assert own == {c.__name__ for c in named if "formula" in vars(c)}
    others = [c for c in named if c.__name__ not in own]
    assert all(own & {base.__name__ for base in c.__mro__} for c in others), "another's equation, on completions of its own"


@pytest.mark.parametrize("slug", YAML)
def test_yaml_states_every_field_and_nothing_else(slug):
    cls, values = settings_of(slug)
    assert values.keys() == {f.name for f in fields(cls)}
    if slug == cls.__name__.lower():  # the file of the method itself; presets of it may differ
        assert cls(**values) == cls(), "conf/algo and the class give different defaults"


@pytest.mark.parametrize("slug", YAML)
def test_both_files_are_small(slug):
    node = class_node(settings_of(slug)[0])
    first = min([node.lineno] + [d.lineno for d in node.decorator_list])
    assert node.end_lineno - first + 1 <= 60
    assert len(YAML[slug].read_text().splitlines()) <= 12


@pytest.mark.parametrize("slug", YAML)
def test_docstring_names_the_paper_and_the_equation(slug):
    cls = settings_of(slug)[0]
    assert cls.paper in cls.__doc__ and cls.paper in YAML[slug].read_text()
    assert re.search(r"^ +L = ", cls.__doc__, re.MULTILINE), "the docstring gives no equation 'L = ...'"


@pytest.mark.parametrize("slug", YAML)
def test_every_field_is_read(slug):
    cls = settings_of(slug)[0]
    read = {
        node.attr for own in cls.__mro__ if issubclass(own, Objective) and own is not Objective for node in ast.walk(class_node(own))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert {f.name for f in fields(cls)} <= read


@pytest.mark.parametrize("slug", YAML)
def test_every_method_has_checkable_numbers(slug):
    cls = settings_of(slug)[0]
    assert default(slug).formula and cls.golden


@pytest.mark.parametrize(("slug", "rule"), RULES)
def test_rule_rejects_bad_settings(slug, rule):
    cls, values = settings_of(slug)
    used = {node.id for node in ast.walk(ast.parse(rule, mode="eval")) if isinstance(node, ast.Name)} & values.keys()
    candidates = (-1e9, -1, -0.25, 0, 0.25, 0.5, 1, 2, 1e9, "no such choice")
    broken = 0
    for trial in itertools.product(candidates, repeat=len(used)):
        bad = values | dict(zip(sorted(used), trial, strict=True))
        try:
            if [r for r in cls.require if not holds(r, bad)] != [rule]:
                continue
        except TypeError:  # a word where the rule compares numbers
            continue
        broken += 1
        with pytest.raises(ValueError, match=re.escape(rule)):
            cls(**bad)
    assert broken, f"nothing breaks the rule {rule!r}"


@pytest.mark.parametrize("slug", YAML)
def test_unknown_setting_is_rejected(slug):
    cls, values = settings_of(slug)
    with pytest.raises(TypeError, match="no_such_setting"):
        cls(**values, no_such_setting=1)


@pytest.mark.parametrize("slug", YAML)
def test_declarations_are_known_ones(slug):
    objective = default(slug)
    assert objective.view in VIEWS and objective.coupling in ("local", "global")
    assert set(objective.columns) <= {"weight", "label", "margin", "logp"}
    known = {"logp", "reward", "step_logp", "states", "layers", *PER_TOKEN, *SHAPES}
    assert "policy" in objective.quantities and all(set(q) <= known for q in objective.quantities.values())
    if "divergence" in objective.quantities["policy"]:
        kind, scorer = objective.divergence_from
        assert kind in KINDS and scorer in objective.quantities.keys() - {"policy"}


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_objectives_import_only_torch(path):
    def allowed(name):
        return name.split(".")[0] in {"torch", *sys.stdlib_module_names} or f"{name}.".startswith("prefopt.objectives.")

    assert [name for name in imported(path) if not allowed(name)] == []
