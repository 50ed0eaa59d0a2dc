"""Every config file is documented, complete and typed, and every key of the schema is read somewhere."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from prefopt.config import catalogue, schema
from prefopt.config.catalogue import conf_dir, key_lines, load_yaml, resolved_keys

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "prefopt"
DATA = (".yaml", ".j2", ".css", ".html", ".jinja", ".js")
FILES = sorted(conf_dir().glob("**/*.yaml"))
SCHEMAS = {
    "model": schema.ModelConfig,
    "data": schema.DataConfig,
    "hardware": schema.HardwareConfig,
    "tracker": schema.TrackerConfig,
    "reward": schema.RewardConfig,
    "sampler": schema.SamplerConfig,
    "noise": schema.NoiseConfig,
    "source": schema.SourceConfig,
    "reference": schema.ReferenceConfig,
    "teacher": schema.TeacherConfig,
}
TYPED = [(group, name) for group in SCHEMAS for name in catalogue.groups()[group]]
OVERLAYS = ("adapter", "transforms", "stages", "experiment", "sweep", "debug")
GLOBAL = [(group, name) for group in OVERLAYS for name in catalogue.groups()[group]]


def _id(path: Path) -> str:
    return str(path.relative_to(conf_dir()))


def _keys(cls: type, prefix: str = "") -> dict[str, bool]:
    """Dotted keys of a schema; True for those that hold others."""
    keys = {}
    for f in dataclasses.fields(cls):
        nested = f.default_factory if dataclasses.is_dataclass(f.default_factory) else None
        keys[prefix + f.name] = nested is not None
        keys |= _keys(nested, f"{prefix}{f.name}.") if nested else {}
    return keys


def _leaves(keys) -> set[str]:
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_every_key_is_commented(path):
    """On its line or the line above. One comment on a block may speak for the keys right below it."""
    keys = {key: line for key, line in key_lines(path).items() if key not in ("_target_", "defaults")}
    bare = [
        key
        for key in _leaves(keys)
        if not keys[key].comment and not ("." in key and keys[key.rpartition(".")[0]].comment)
    ]
    assert not bare, f"{_id(path)}: no comment on {sorted(bare)}"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), f"{_id(path)} does not say what it is"
    if path.parent != conf_dir():
        assert catalogue.header(path.parent.relative_to(conf_dir()).as_posix(), path.stem), f"{_id(path)} has no header"


@pytest.mark.parametrize("slug", catalogue.groups()["algo"])
def test_algorithms_are_short(slug):
    assert len((conf_dir() / "algo" / f"{slug}.yaml").read_text().splitlines()) <= 12


@pytest.mark.parametrize(("group", "name"), TYPED, ids=["/".join(item) for item in TYPED])
def test_groups_fit_the_schema(group, name):
    """Both ways: no key that the schema lacks, and every default visible in the file."""
    keys = resolved_keys(group, name)
    assert set(keys) == set(_keys(SCHEMAS[group]))


@pytest.mark.parametrize("command", sorted(schema.COMMANDS))
def test_commands_fit_the_schema(command):
    path = conf_dir() / f"{schema.config_of(command)}.yaml"
    chosen = {key for entry in load_yaml("", schema.config_of(command))["defaults"] if isinstance(entry, dict) for key in entry}
    named = {key.removeprefix("optional ") for key in chosen if "override" not in key}
    assert {group for group in named if "/" not in group} <= set(catalogue.GROUPS)
    own = {key for key in key_lines(path) if key.partition(".")[0] not in ("defaults", "hydra")}
    wanted = {key for key in _keys(schema.COMMANDS[command]) if key.partition(".")[0] not in named}
    assert own == wanted


@pytest.mark.parametrize(("group", "name"), GLOBAL, ids=["/".join(item) for item in GLOBAL])
def test_overlays_name_real_keys(group, name):
    """Experiments, sweeps and debug settings change keys of the training config, and choose configs that exist."""
    text = (conf_dir() / group / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    chosen = {
        key.removeprefix("override ").lstrip("/"): value
        for entry in load_yaml(group, name).get("defaults", [])
        if isinstance(entry, dict)
        for key, value in entry.items()
    }
    assert all((conf_dir() / key / f"{value}.yaml").is_file() for key, value in chosen.items())
    known = set(_keys(schema.TrainConfig))
    for key in _leaves(resolved_keys(group, name)):
        key = re.sub(r"^(hydra\.sweeper\.params|stages\.\w+)\.", "", key)
        key = re.sub(r"^data\.transforms\..*", "data.transforms", key)  # test_transforms looks into them
        if key.startswith("algo."):
            assert key.removeprefix("algo.") in catalogue.algo_info(chosen["algo"]).fields
        elif not key.startswith("hydra.") and key not in catalogue.GROUPS:
            assert key in known, f"{group}/{name}: {key}"


def test_choices_and_bounds_name_real_keys():
    known = {key for cls in schema.COMMANDS.values() for key in _keys(cls)}
    assert set(schema.CHOICES) <= known
    assert {key for key, _, _ in schema.BOUNDS} <= known


def test_trap_31_every_schema_key_is_read():
    """A key nobody reads is a lie. Read means: an attribute of that name in prefopt outside the schema; or ${key} in
    another config; or, in a block that code turns into a dict by `asdict(x.block)`, the name as a text constant.
    """
    nodes = [
        node
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "config" / "schema.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("asdict")]
    blocks = {call.args[0].attr for call in calls if call.args and isinstance(call.args[0], ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    interpolated = {key for path in FILES for key in re.findall(r"\$\{([\w.]+)\}", path.read_text(encoding="utf-8"))}

    def is_read(key: str) -> bool:
        block, _, name = key.rpartition(".")
        return name in attributes or key in interpolated or (block.rpartition(".")[2] in blocks and name in texts)

    unread = sorted(key for cls in schema.COMMANDS.values() for key in _keys(cls) if not is_read(key))
    assert not unread, f"no code reads {unread}"


def test_package_list_is_complete():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    found = {".".join(("prefopt", *folder.relative_to(PACKAGE).parts)) for folder in folders}
    assert set(tool["packages"]) == {*found, "prefopt.conf"}
    assert tool["package-dir"]["prefopt.conf"] == "conf" and (ROOT / "conf" / "__init__.py").is_file()


def test_package_data_is_complete():
    """Every config, template and style sheet travels with the wheel."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, patterns in tool["package-data"].items():
        folder = ROOT / "conf" if package == "prefopt.conf" else ROOT.joinpath(*package.split("."))
        packed = {path for pattern in patterns for path in folder.glob(pattern)}
        data = {path for path in folder.rglob("*") if path.suffix in DATA}
        assert data <= packed, f"{package}: {sorted(str(p) for p in data - packed)} would be left out"
    carried = {ROOT / "conf", *(ROOT.joinpath(*package.split(".")) for package in tool["package-data"])}
    loose = [path for path in PACKAGE.rglob("*") if path.suffix in DATA and not carried & set(path.parents)]
    assert not loose, f"{loose} would be left out"
