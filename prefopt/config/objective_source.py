"""Reads an objective's hyper-parameters and needs from its source: listing and checks import neither it nor torch."""

from __future__ import annotations

import ast
import importlib.util
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from prefopt.config.schema import REQUIRED
from prefopt.errors import UserError, nearest

BASE = "prefopt.objectives.base.Objective"


@dataclass
class FieldInfo:
    type: str
    default: Any


@dataclass
class ObjectiveInfo:
    """An objective class as its source says it is. The class attributes of `Objective` are fields here."""

    slug: str | None
    target: str
    name: str
    doc: str
    fields: dict[str, FieldInfo]
    view: str
    quantities: dict[str, tuple[str, ...]]
    coupling: str
    divergence_from: tuple[str, str]
    columns: tuple[str, ...]
    proper_likelihood: bool
    pictures: bool
    mismatched: bool
    steps: bool
    extra: tuple[str, ...]
    extra_scorers: tuple[str, ...]
    min_batch: int
    starts_level: bool
    first_step: str
    paper: str
    require: tuple[str, ...]
    formula: dict[str, str]
    golden: tuple
    limits: tuple
    class_vars: dict[str, Any] = field(default_factory=dict)  # all of them, those of `Objective` included

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.quantities

    @property
    def needs_live_reference(self) -> bool:
        """Whether it reads more of its reference than log-probs, which are all that a store keeps (`Objective.states_of`)."""
        compared = "divergence" in self.quantities.get("policy", ()) and self.divergence_from[1] == "reference"
        return compared or bool({"states", "layers"} & set(self.quantities.get("reference", ())))

    @property
    def compares_states(self) -> bool:
        """Whether the policy is compared with states that another scorer hands over, place by place (`Objective.states_of`)."""
        return "divergence" in self.quantities.get("policy", ()) or any({"states", "layers"} & set(q) for q in self.quantities.values())

    @property
    def scores_rewards(self) -> bool:
        """Whether it trains a reward model, which has no log-probs and writes nothing."""
        return "reward" in self.quantities.get("policy", ())

    @property
    def stepwise(self) -> bool:
        """Whether its completions are transitions of a sampler."""
        return "step_logp" in self.quantities.get("policy", ())

    @property
    def token_level(self) -> bool:
        return any("token_logp" in quantities for quantities in self.quantities.values())

    @property
    def summary(self) -> str:
        """First line of the docstring, without the arXiv number and the full stop."""
        return re.sub(r"\s*\(arXiv [^)]*\)", "", self.doc.partition("\n")[0]).rstrip(".")


@dataclass
class _Module:
    name: str
    path: Path
    symbols: dict[str, Any]  # name -> class or value node, or (module, name or None) of an import


@dataclass
class _ModuleRef:
    name: str


def read_objective(target: str, packages: Sequence[str] = ()) -> ObjectiveInfo:
    """The class `target` (`package.module.Class`). Only prefopt and the trusted `packages` may be named."""
    module_name, _, name = str(target).rpartition(".")
    top = module_name.partition(".")[0]
    if not all(part.isidentifier() for part in str(target).split(".")) or not module_name:
        raise UserError(f"algo._target_={target} does not name a class; write it as package.module.Class")
    if not any(target.startswith(f"{package}.") for package in ("prefopt", *packages)):
        raise UserError(
            f"algo._target_={target} is outside prefopt; if you trust that code, set trust.packages=[{top}]"
        )
    module = _open(module_name)
    if module is None:
        raise UserError(f"algo._target_={target}: {_missing_module(module_name)}")
    try:
        found = _lookup(module_name, name)
    except LookupError:
        known = [key for key, node in module.symbols.items() if isinstance(node, ast.ClassDef)]
        raise UserError(f"algo._target_={target}: {module_name} has no class {name}{nearest(name, known)}") from None
    if not isinstance(found, type) or not any(cls.__dict__.get("_source") == BASE for cls in found.__mro__):
        raise UserError(f"algo._target_={target} is not an objective; it must be a class derived from {BASE}")
    fields, class_vars = {}, {}
    for cls in reversed(found.__mro__[:-1]):
        fields |= cls._own_fields  # a field that is declared again keeps its place, as in a dataclass
        class_vars |= cls._own_vars
    declared = {key: class_vars[key] for key in ObjectiveInfo.__dataclass_fields__ if key in class_vars}
    return ObjectiveInfo(None, target, name, found._doc, fields, **declared, class_vars=class_vars)


def _search(name: str) -> list[Path]:
    """Where a module's file may be; no parent package is imported on the way."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)] if not rest and spec.origin else []
    folders = [Path(location).joinpath(*rest) for location in spec.submodule_search_locations]
    return [path for folder in folders for path in (folder / "__init__.py", folder.with_suffix(".py"))]


def _missing_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    if not parent or not _search(name.partition(".")[0]):
        return f"there is no package {name.partition('.')[0]} here; install it in this environment, or set PYTHONPATH"
    siblings = [f.stem for path in _search(parent) if path.name == "__init__.py" for f in path.parent.glob("*.py")]
    return f"there is no module {name}{nearest(last, [s for s in siblings if s != '__init__'])}"


def _open(name: str) -> _Module | None:
    path = next((path for path in _search(name) if path.suffix == ".py" and path.is_file()), None)
    return _parse(name, path, path.stat().st_mtime_ns) if path else None


@cache
def _parse(name: str, path: Path, changed: int) -> _Module:
    try:
        body = list(ast.parse(path.read_text(encoding="utf-8")).body)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    symbols: dict[str, Any] = {}
    while body:
        node = body.pop(0)
        if isinstance(node, (ast.If, ast.Try)):
            body = [*node.body, *body]
        elif isinstance(node, ast.ClassDef):
            if node.name in symbols:  # class DPO(DPO), on top of an imported one
                symbols[f"{node.name}@{node.lineno}"] = symbols[node.name]
            symbols[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            symbols |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            symbols |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name_here = alias.asname or alias.name.partition(".")[0]
                symbols[name_here] = (alias.name if alias.asname else name_here, None)
    return _Module(name, path, symbols)


def _lookup(module_name: str, name: str, seen: tuple = ()) -> Any:
    """The value of a module's global: a stand-in class, a module, or a plain value. Follows imports."""
    module = None if (module_name, name) in seen else _open(module_name)
    if module is None:
        raise LookupError(name)
    if name not in module.symbols:
        if _open(f"{module_name}.{name}"):
            return _ModuleRef(f"{module_name}.{name}")
        raise LookupError(name)
    node = module.symbols[name]
    if isinstance(node, ast.ClassDef):
        return _stand_in(module, node)
    if isinstance(node, tuple):
        return _lookup(*node, (*seen, (module_name, name))) if node[1] else _ModuleRef(node[0])
    return _evaluate(node, lambda other: _lookup(module_name, other, (*seen, (module_name, name))))


def _stand_in(module: _Module, node: ast.ClassDef) -> type:
    """A class with the same bases, docstring, fields and class attributes: Python itself does the inheriting."""

    def look(name: str) -> Any:
        hidden = f"{name}@{node.lineno}"
        return own[name] if name in own else _lookup(module.name, hidden if hidden in module.symbols else name)

    own: dict[str, Any] = {}
    bases = []
    for base in node.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        root = next((n.id for n in ast.walk(base) if isinstance(n, ast.Name)), "")
        source = module.symbols.get(root)
        if isinstance(source, tuple) and source[0].partition(".")[0] in {"torch", *sys.stdlib_module_names}:
            continue  # brings no hyper-parameters
        try:
            bases.append(_evaluate(base, look))
        except LookupError:
            continue
    parents = [base for base in bases if isinstance(base, type)]
    decorators = {ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2] for d in node.decorator_list}
    fields = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, kind = item.target.id, ast.unparse(item.annotation).strip("'\"")
        elif isinstance(item, ast.Assign) and len(item.targets) == 1 and isinstance(item.targets[0], ast.Name):
            name, kind = item.targets[0].id, "ClassVar"
        else:
            continue
        if re.match(r"(\w+\.)?ClassVar\b", kind):
            try:
                own |= {name: _evaluate(item.value, look)} if item.value else {}
            except LookupError:
                if any(hasattr(parent, name) for parent in parents):  # one of those that prefopt reads
                    raise _unreadable(module, item, f"{node.name}.{name}") from None
        elif "dataclass" in decorators and not re.match(r"(\w+\.)?(KW_ONLY|InitVar)\b", kind):
            try:
                default, is_init = _default(item.value, look)
            except LookupError:
                raise _unreadable(module, item, f"{node.name}.{name}") from None
            fields |= {name: FieldInfo(kind, default)} if is_init else {}
    doc, source = ast.get_docstring(node) or "", f"{module.name}.{node.name}"
    return type(
        node.name, tuple(parents), {**own, "_own_fields": fields, "_own_vars": own, "_doc": doc, "_source": source}
    )


def _unreadable(module: _Module, item: ast.stmt, what: str) -> UserError:
    return UserError(
        f"{module.path}, line {item.lineno}: {what} must be a plain value (number, text, tuple, dict, or the name of "
        "one), because prefopt reads objectives without importing them"
    )


def _default(node: ast.expr | None, look: Callable[[str], Any]) -> tuple[Any, bool]:
    """Default of a dataclass field (`???` if it has none), and whether its constructor takes it."""
    if node is None:
        return REQUIRED, True
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "field"):
        return _evaluate(node, look), True
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    is_init = "init" not in given or bool(_evaluate(given["init"], look))
    if factory := given.get("default_factory"):
        call = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
        return _evaluate(call, look), is_init
    return (_evaluate(given["default"], look) if "default" in given else REQUIRED), is_init


_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.BitOr: operator.or_,
}  # fmt: skip
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_CALLS = {"float": float, "int": int, "tuple": tuple, "list": list, "dict": dict, "set": set, "frozenset": frozenset}


def _evaluate(node: ast.expr, look: Callable[[str], Any]) -> Any:
    """Value of a plain expression; `LookupError` for anything that would need running code."""
    try:
        return _value(node, look)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise LookupError(ast.unparse(node)) from error


def _value(node: ast.expr, look: Callable[[str], Any]) -> Any:
    def every(nodes: Iterable[ast.expr]) -> list:
        spread = ((n, _evaluate(n.value if isinstance(n, ast.Starred) else n, look)) for n in nodes)
        return [x for n, value in spread for x in (value if isinstance(n, ast.Starred) else [value])]

    match node:
        case ast.Constant():
            return node.value
        case ast.Tuple() | ast.List() | ast.Set():
            return {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)](every(node.elts))
        case ast.Dict():
            parts = ({_evaluate(k, look): v} if k else v for k, v in zip(node.keys, every(node.values), strict=True))
            return {key: value for part in parts for key, value in part.items()}
        case ast.UnaryOp() if type(node.op) in _UNARY:
            return _UNARY[type(node.op)](_evaluate(node.operand, look))
        case ast.BinOp() if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](_evaluate(node.left, look), _evaluate(node.right, look))
        case ast.JoinedStr():
            return "".join(str(part) for part in every(node.values))
        case ast.FormattedValue(format_spec=None, conversion=-1):
            return _evaluate(node.value, look)
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            return _CALLS[name](*every(node.args), **{k.arg: _evaluate(k.value, look) for k in node.keywords if k.arg})
        case ast.Subscript():
            return _evaluate(node.value, look)[_evaluate(node.slice, look)]
        case ast.Name():
            return look(node.id)
        case ast.Attribute():
            owner = _evaluate(node.value, look)
            if isinstance(owner, _ModuleRef):
                return getattr(math, node.attr) if owner.name == "math" else _lookup(owner.name, node.attr)
            if isinstance(owner, type) and not node.attr.startswith("_") and hasattr(owner, node.attr):
                return getattr(owner, node.attr)
    raise LookupError(ast.unparse(node))
