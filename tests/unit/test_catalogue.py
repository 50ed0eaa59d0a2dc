"""The catalogue reads source and YAML as text; here it is compared with the imported classes and with OmegaConf."""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, get_origin

import pytest
from omegaconf import OmegaConf

import prefopt.objectives
from prefopt.config import catalogue, listing
from prefopt.config.docstring import doc_parts
from prefopt.errors import UserError
from prefopt.objectives.base import Objective

ROOT = Path(__file__).resolve().parents[2]
ITEMS = [(group, name) for group, names in catalogue.groups().items() for name in names]
# Published systems that must be there, whatever group each of them lives in, with their papers.
PUBLISHED = (
    ("dpo", "2305.18290"), ("simpo", "2405.14734"), ("ld_dpo", "2409.06411"), ("tdpo", "2404.11999"), ("tgdpo", "2506.14574"),
    ("rdpo_robust", "2403.00409"), ("rpo_regularized", "2405.16436"), ("bco", "2404.04656"), ("is_daa", "2506.08681"),
    ("madpo", "2510.05342"), ("sem_dpo", "2507.20133"), ("f_dpo", "2601.03027"), ("tab_po", "2603.00025"), ("sparsepo", "2410.05102"),
    ("t_reg", "2412.02685"), ("asft", "2409.10571"), ("pro", "2306.17492"), ("lipo", "2402.01878"), ("rso", "2309.06657"),
    ("tpo_tree", "2410.12854"), ("align_distil", "2503.02832"), ("ra_dpo", "2410.08067"), ("rationale_po", "2407.14477"),
    ("curry_dpo", "2403.07230"), ("flr", "2409.13948"), ("spo_selfsup", "2409.17791"), ("cpo_constrained", "2605.20834"),
    ("srpo", "2406.01660"), ("apo_accelerated", "2410.06293"), ("sft_dpo_bridge", "2507.00018"), ("logic_dpa", "2412.17696"),
    ("r_to_q", "2404.12358"), ("irepo", "2405.15230"), ("mpo_mixed", "2403.19443"), ("ofs_dpo", "2406.05534"), ("tvkd", "2509.16965"),
)


def _objectives() -> list[type]:
    found = pkgutil.iter_modules(prefopt.objectives.__path__, "prefopt.objectives.")
    modules = [importlib.import_module(module.name) for module in found]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return sorted((c for c in classes if issubclass(c, Objective) and c is not Objective), key=lambda c: c.__name__)


def _same(info: catalogue.ObjectiveInfo, cls: type) -> None:
    assert info.name == cls.__name__
    assert info.doc == inspect.cleandoc(cls.__doc__)
    seen = {}
    for f in dataclasses.fields(cls):
        has_factory = f.default_factory is not dataclasses.MISSING
        default = f.default_factory() if has_factory else f.default
        seen[f.name] = (f.type, "???" if default is dataclasses.MISSING else default)
    assert {name: (f.type, f.default) for name, f in info.fields.items()} == seen
    assert list(info.fields) == list(seen)
    names = {n for c in cls.__mro__ for n, kind in vars(c).get("__annotations__", {}).items() if _is_class_var(kind)}
    assert {name: getattr(cls, name) for name in names} == info.class_vars
    for name in names:
        assert getattr(info, name) == getattr(cls, name)


def _is_class_var(kind: object) -> bool:
    return kind is ClassVar or get_origin(kind) is ClassVar or str(kind).startswith("ClassVar")


@pytest.mark.parametrize("cls", _objectives(), ids=lambda c: c.__name__)
def test_source_view_equals_class(cls):
    _same(catalogue.objective_info(f"{cls.__module__}.{cls.__name__}"), cls)


def test_every_objective_has_settings_and_every_setting_an_objective():
    infos = [catalogue.algo_info(slug) for slug in catalogue.groups()["algo"]]
    assert {info.target for info in infos} == {f"{c.__module__}.{c.__name__}" for c in _objectives()}
    for info in infos:
        assert list(catalogue.algo_settings(info.slug)) == list(info.fields), info.slug
        assert catalogue.objective_info(info.target).slug in catalogue.groups()["algo"]


FAMILY = '''
"""A user's package."""
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from prefopt.objectives.base import Objective, Terms
from prefopt.objectives.pairwise import DPO

SCALE = 0.5
LOSS = "-log(sigmoid({}))"


class Mixin:
    paper: ClassVar = "0000.00000"


@dataclass
class Middle(Mixin, DPO):
    """Middle."""

    beta: float = SCALE / 2
    floor: float = -math.inf
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    names: list[str] = field(default_factory=list)
    cache: dict = field(init=False, default_factory=dict)

    columns = (*DPO.columns, "extra")
    formula: ClassVar[dict[str, str]] = {**DPO.formula, "more": f"{SCALE} * h"}
    kernel: ClassVar = torch.ones(3)
'''
CHILD = '''
from dataclasses import dataclass

from . import family
from .family import Middle as Parent, SCALE
from prefopt.objectives.unary import KTO


@dataclass
class Child(family.Middle):
    """Child."""

    added: float = SCALE
    beta: float = 3.0

    min_batch = 4


class Plain(Parent):
    """Not a dataclass of its own."""

    other: float = 1.0


@dataclass
class KTO(KTO):
    """Shadows what it is built on."""

    beta: float = 0.7


class Stranger:
    """No objective."""


@dataclass
class Computed(Parent):
    """Has a hyper-parameter that only running code could tell."""

    beta: float = len("abc")
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "family_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .child import Child\nraise RuntimeError('must not be imported')\n")
    (folder / "family.py").write_text(FAMILY)
    (folder / "child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "family_pkg"]:
        del sys.modules[name]


def test_user_package_needs_trust(package):
    with pytest.raises(UserError, match=r"family_pkg\.child\.Child is outside prefopt.*trust\.packages=\[family_pkg\]"):
        catalogue.objective_info("family_pkg.child.Child")
    with pytest.raises(UserError, match="outside prefopt"):
        catalogue.objective_info("family_pkg.child.Child", ["family"])
    assert catalogue.objective_info("family_pkg.child.Child", ["family_pkg"]).slug is None
    assert "family_pkg" not in sys.modules


def test_inheritance_across_modules(package):
    read = {n: catalogue.objective_info(f"family_pkg.child.{n}", ["family_pkg"]) for n in ("Child", "Plain", "KTO")}
    assert catalogue.objective_info("family_pkg.Child", ["family_pkg"]).fields == read["Child"].fields
    (package / "__init__.py").write_text("")
    module = importlib.import_module("family_pkg.child")
    for name, info in read.items():
        cls = getattr(module, name)
        assert info.doc == inspect.cleandoc(cls.__doc__)
        expected = {
            f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(cls)
            if f.init
        }
        assert {key: value.default for key, value in info.fields.items()} == expected
        assert list(info.fields) == list(expected)
        for key in ("view", "columns", "formula", "paper", "min_batch", "require", "coupling", "golden"):
            assert getattr(info, key) == getattr(cls, key), key
    assert read["Child"].fields["floor"].default == -math.inf
    assert read["Child"].columns == ("weight", "label", "margin", "extra")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("prefopt.objectives.pairwise.DP0", r"has no class DP0; did you mean 'DPO'\?"),
        ("prefopt.objectives.pairwize.DPO", r"no module prefopt\.objectives\.pairwize; did you mean 'pairwise'\?"),
        ("prefopt.objective.pairwise.DPO", r"no module prefopt\.objective\.pairwise"),
        ("DPO", "package.module.Class"),
        ("prefopt.objectives.pairwise.DPO()", "package.module.Class"),
        ("os.system", r"os\.system is outside prefopt"),
        ("prefoptx.a.B", "outside prefopt"),
        ("prefopt.objectives.base.Batch", "not an objective"),
        ("prefopt.errors.nearest", "has no class|not an objective"),
        ("family_pkg.child.Stranger", "not an objective"),
        ("family_pkg.child.Computed", r"child\.py, line \d+: Computed\.beta must be a plain value"),
        ("no_such_package.a.B", "there is no package no_such_package here"),
    ],
)
def test_bad_targets(package, target, message):
    with pytest.raises(UserError, match=message):
        catalogue.objective_info(target, ["family_pkg", "no_such_package"])


def test_syntax_error_names_file_and_line(package):
    (package / "family.py").write_text("class X(:\n")
    with pytest.raises(UserError, match=r"family\.py, line 1"):
        catalogue.objective_info("family_pkg.family.X", ["family_pkg"])


@pytest.mark.parametrize(("group", "name"), ITEMS, ids=["/".join(item) for item in ITEMS])
def test_yaml_text_equals_omegaconf(group, name):
    path = catalogue.conf_dir() / group / f"{name}.yaml"
    loaded = OmegaConf.to_container(OmegaConf.load(path)) or {}
    assert catalogue.load_yaml(group, name) == loaded
    for line_key, line in catalogue.key_lines(path).items():
        assert "#" not in line.value
        key = line_key
        node = loaded
        while key:  # names of swept keys have dots in them
            part = next(name for name in node if key == name or key.startswith(f"{name}."))
            node, key = node[part], key[len(part) + 1 :]
        if line.value and line_key != "defaults":
            assert OmegaConf.to_container(OmegaConf.create(f"x: {line.value}"))["x"] == node


def test_key_lines(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# header\na: 'x # y'  # first\n# above\nb:\n  c: it's  # quote's\n  d: [1, '#']\n"
        "e: 5e-7 # last\nf:\n  - 1\n  - 2\n"
    )
    assert {key: (line.value, line.comment) for key, line in catalogue.key_lines(file).items()} == {
        "a": ("'x # y'", "first"),
        "b": ("", "above"),
        "b.c": ("it's", "quote's"),
        "b.d": ("[1, '#']", ""),
        "e": ("5e-7", "last"),
        "f": ("[1, 2]", ""),
    }


def test_inherited_keys():
    keys = catalogue.resolved_keys("model", "llama3-8b-instruct-lora")
    assert "defaults" not in keys
    assert keys["name"].value == "llama3-8b-instruct-lora"
    assert keys["path"].value == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert keys["lora.enabled"].value == "true"
    assert keys["lora.r"] == catalogue.key_lines(catalogue.conf_dir() / "model" / "llama3-8b.yaml")["lora.r"]


@pytest.mark.parametrize(("group", "name"), ITEMS, ids=["/".join(item) for item in ITEMS])
def test_show(group, name):
    text = listing.show_text(f"{group}={name}")
    lines = text.splitlines()
    assert f"prefopt train algo={name}" in text or f"{group}={name}" in text.partition("Use\n")[2]
    assert all(len(line) <= listing.WIDTH for line in lines if " " in line.strip())
    if group == "algo":
        info = catalogue.algo_info(name)
        assert lines[0].startswith(f"{name}: ")
        assert not info.paper or f"https://arxiv.org/abs/{info.paper}" in text
        assert all(f"  {term} = " in text for term in info.formula)
        assert all(f"algo.{key}: " in text for key in info.fields)
        assert any(line.startswith("  reference: ") for line in lines) == info.needs_reference
        assert all(f"\n{title}\n" in text for title in ("Equation", *listing.SAID.values())), "a label is missing from the docstring"
        assert all(f"prefopt train +experiment={found}" in text for found in catalogue.experiments(name))
        assert all(f"{key}={value}" in text for key, value in catalogue.brings(name).items())
    else:
        header = " ".join(catalogue.header(group, name))
        assert header and header in " ".join(text.split())
        for key, line in catalogue.resolved_keys(group, name).items():
            assert not line.value or f"{key}: {line.value}" in text
            assert " ".join(line.comment.split()) in " ".join(text.replace("# ", "").split())


@pytest.mark.parametrize(("slug", "paper"), PUBLISHED, ids=[slug for slug, _ in PUBLISHED])
def test_every_published_system_is_found(slug, paper):
    text = listing.show_text(slug)
    assert text.startswith((f"{slug}: ", *(f"{group}={slug}\n" for group in catalogue.GROUPS))) and paper in text
    assert len({arxiv for _, arxiv in PUBLISHED}) == len(PUBLISHED) == 36


def test_files_of_one_class_are_told_apart():
    said = {}
    for slug in catalogue.groups()["algo"]:
        said.setdefault(catalogue.summary(slug), []).append(slug)
    assert [slugs for slugs in said.values() if len(slugs) > 1] == []
    assert catalogue.summary("dpo").startswith("Direct Preference Optimization: ")
    assert catalogue.summary("cdpo") == "Conservative DPO: DPO with smoothed labels, as its authors' code has it"
    assert catalogue.summary("online_dpo").startswith("Online DPO: DPO on pairs that the policy itself has written")


def test_what_a_docstring_says():
    doc = """First line (arXiv 0000.00000).

    h = a - b
    L(y) = -log sigmoid(h), mean over pairs. Rewards: h. Ranges: loss starts at ln 2;
    rewards at 0. They grow.
    When: always. Limits: none that
    we know of. L = x is no equation here.
    """
    equations, prose, said = doc_parts(inspect.cleandoc(doc))
    assert (equations, prose) == (["h = a - b", "L(y) = -log sigmoid(h), mean over pairs."], "")
    assert said == {"Rewards": "h.", "Ranges": "loss starts at ln 2; rewards at 0. They grow.", "When": "always.",
                    "Limits": "none that we know of. L = x is no equation here."}
    assert doc_parts("First line.\n\nProse, and\nmore of it. Limits: one.") == ([], "Prose, and more of it.", {"Limits": "one."})


@pytest.mark.parametrize("words, said", [
    (["diffusion_dpo"], ["for model=sd15 at 512 pixels D is 16,384", "algo.beta: 2000/D is 0.1221"]),
    (["diffusion_dpo", "model=sdxl"], ["for model=sdxl at 1024 pixels D is 65,536", "algo.beta: 2000/D is 0.03052"]),
    (["model=sdxl", "flow_rwr", "model.resolution=512"], ["for model=sdxl at 512 pixels D is 16,384", "algo.scale: 2/D is 0.0001221"]),
    (["algo=dpo", "model=tiny-flow"], ["for model=tiny-flow at 32 pixels D is 768"]),
    (["model=sdxl"], ["model.latent: [4, 8]"]),
], ids=lambda value: "-".join(value) if "D is" not in "".join(value) else "")
def test_show_says_what_a_setting_per_latent_dim_is(words, said):
    text = listing.show_command(words)
    assert all(line in text for line in said)


@pytest.mark.parametrize("words, said", [
    (["dpo", "model=tiny-lm"], "model=tiny-lm makes no pictures"), (["sdxl", "model=sdxl"], "sdxl is no algorithm"),
    (["dpo", "model=sdx"], "there is no config named model=sdx; did you mean 'sdxl'"), (["dpo", "ipo"], "takes one name"),
    ([], "takes one name"),
    (["dpo", "model.resolution=big"], "model.resolution=big: it must be a whole number"), (["dpo", "model.path=x"], "not model.path"),
], ids=lambda value: "-".join(value) or "nothing" if isinstance(value, list) else "")
def test_show_refuses(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        listing.show_command(words)


def test_show_finds_all_groups_and_suggests():
    text = listing.show_text("bandit")
    assert "model=bandit\n" in text and "data=bandit\n" in text
    assert catalogue.find("bandit") == [("model", "bandit"), ("data", "bandit")]
    assert catalogue.find("data/bandit") == [("data", "bandit")]
    assert catalogue.find("IPO") == [("algo", "ipo")]
    with pytest.raises(UserError, match="named simpa; did you mean 'simpo'?"):
        listing.show_text("simpa")
    with pytest.raises(UserError, match="algo=Simp does not exist; did you mean 'simpo'?"):
        catalogue.algo_info("Simp")


@pytest.mark.parametrize("group", [None, *catalogue.GROUPS])
def test_list(group):
    lines = listing.list_text(group).splitlines()
    for name in catalogue.groups()[group] if group else [name for _, name in ITEMS]:
        assert any(line.split()[:1] == [name] for line in lines), name
    assert max(map(len, lines)) <= listing.WIDTH


def _slugs(text: str) -> list[str]:
    """Names of the table, below its titles: they stand two columns in, what is wrapped stands further."""
    return re.findall(r"^  (\w+) ", text.partition("\n")[2], re.MULTILINE)


def test_list_is_grouped_by_what_methods_read():
    blocks = [block.splitlines() for block in listing.list_text("algo").split("\n\n")[1:]]
    infos = [catalogue.algo_info(slug) for slug in catalogue.groups()["algo"]]
    for head, *rows in blocks:
        view, _, said = head.partition(": ")
        assert said == catalogue.VIEWS[view]
        assert _slugs("\n".join(["titles", *rows])) == [info.slug for info in infos if info.view == view]
    assert [block[0].partition(":")[0] for block in blocks] == [v for v in catalogue.VIEWS if v in {info.view for info in infos}]
    text = " ".join(listing.list_text("algo").split())
    assert "online_dpo 2402.04792 any Online DPO: DPO on pairs that the policy itself has written" in text
    assert "has labelled. Needs: reference, samples" in text


def test_list_filters():
    infos = {slug: catalogue.algo_info(slug) for slug in catalogue.groups()["algo"]}
    for view in {info.view for info in infos.values()}:
        shown = _slugs(listing.list_command(["algo", "--view", view]))
        assert shown == [slug for slug, info in infos.items() if info.view == view]
    for word, test in catalogue.NEEDS.items():
        wanted = {slug for slug, info in infos.items() if test(info)}
        assert set(_slugs(listing.list_command([f"--needs={word}"]))) == wanted
        assert set(_slugs(listing.list_command(["--needs", f"no-{word}", "algo"]))) == set(infos) - wanted
    any_model = set(_slugs(listing.list_command(["algo", "--modality", "diffusion"])))
    assert {"dpo", "simpo", "kto", "lipo", "sft"} <= any_model and not {"orpo", "ld_dpo", "grpo"} & any_model
    assert {"diffusion_dpo", "abc_diffusion"} <= any_model and "reward_bt" not in any_model
    assert all(info.token_level or info.proper_likelihood or info.scores_rewards or slug in any_model for slug, info in infos.items()
               if all(set(q) <= {"logp", "reward", "token_logp"} for q in info.quantities.values()) and not info.extra)
    texts = set(_slugs(listing.list_command(["--modality=llm"])))
    assert texts | any_model == set(infos) and {"dpo", "reward_bt"} <= texts and not {"diffusion_dpo", "abc_diffusion", "dspo"} & texts
    assert listing.list_command(["algo", "--view", "demonstrations", "--needs", "teacher"]) == "no method fits"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["algos"], "no group algos; did you mean 'algo'?"),
        (["model", "--view", "pairs"], "not model"),
        (["--view", "pair"], "did you mean 'pairs'?"),
        (["--needs", "referense"], "did you mean 'reference'?"),
        (["--neds", "reference"], "no option --neds; did you mean '--needs'?"),
        (["--view"], "--view needs a value"),
        (["--modality"], "--modality needs a value, such as diffusion"),
        (["--modality", "difusion"], "none of llm, diffusion; did you mean 'diffusion'?"),
        (["algo", "model"], "one group"),
    ],
)
def test_bad_list_words(argv, message):
    with pytest.raises(UserError) as caught:
        listing.list_command(argv)
    assert message in str(caught.value)


def _make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_are_up_to_date(capsys):
    assert _make_docs().main(["--check"]) == 0, capsys.readouterr().err


def test_every_published_system_stands_in_the_table_of_checks():
    page = (ROOT / "docs" / "algorithms.md").read_text()
    lines = page.partition("## What is tested")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {row[0].partition("]")[0][1:]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert set(rows) >= {*catalogue.groups()["algo"], *(slug for slug, _ in PUBLISHED)}
    for name, row in rows.items():
        stepwise = name in catalogue.groups()["algo"] and catalogue.algo_info(name).stepwise  # of transitions there is one path
        columns = ("formula", "golden", "gradient", "splits", *([] if stepwise else ["fast path"]))
        by_registration = [row[column] for column in columns]
        assert set(by_registration) == ({"yes"} if name in catalogue.groups()["algo"] else {""}), name
        assert any(list(row.values())[1:]), name
        assert f"\n## {name}\n" in page


def test_docs_check_sees_a_stale_file(tmp_path, monkeypatch):
    module = _make_docs()
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs" / "algorithms.md")
    assert module.main(["--check"]) == 1 and not module.DOCS.exists()
    assert module.main([]) == 0 and module.main(["--check"]) == 0
    module.DOCS.write_text(module.DOCS.read_text() + "x")
    assert module.main(["--check"]) == 1
    text = module.page()
    assert all(f"\n## {slug}\n" in text for slug in catalogue.groups()["algo"])
    assert module.loss_at_start(catalogue.algo_info("dpo"), {}) == pytest.approx(math.log(2))
    assert module.loss_at_start(catalogue.algo_info("ipo"), {"tau": 0.5}) == pytest.approx(1.0)
    assert module.loss_at_start(catalogue.algo_info("sft"), {}) is None


def test_imports_nothing_heavy():
    """A subprocess, because this one has torch loaded already."""
    code = (
        "import sys, prefopt.config.listing as c, prefopt.config.doctor as d; c.list_text(); c.list_text('algo'); "
        "c.show_text('dpo'); d.doctor_text(); "
        "assert not {'torch', 'hydra', 'omegaconf', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
