"""From composed configs to typed ones: every key typed and bounded, every sentence names its key."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from prefopt.config import catalogue
from prefopt.config.compose import check_algo, dotted, rephrase, typed, unknown_key
from prefopt.config.schema import BOUNDS, CHOICES, COMMANDS, PICTURE_REWARDS, all_keys, config_of
from prefopt.config.strength import SD15, in_nats, per_mean
from prefopt.data.fits import check_data
from prefopt.errors import UserError
from prefopt.launch.app import parse, refuse


def composed(*overrides: str, command: str = "train"):
    """What Hydra makes of the overrides, without starting a run."""
    for name in ("slug", "output_dir"):
        OmegaConf.register_new_resolver(name, lambda *args: "runs/x", replace=True)
    with initialize_config_module("prefopt.conf", version_base="1.3"):
        return compose(config_of(command), list(overrides))


# What a command cannot do without.
NEEDED = {"eval": ["run=x"], "sample": ["run=x"], "label": ["reward.path=x", "output=x.jsonl"]}


def refusal(*overrides: str, command: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        typed(composed(*overrides, command=command), command, "dpo")
    return str(caught.value)


PICTURES = ["model=tiny-diffusion", "data=tiny-pictures"]


@pytest.fixture(scope="module")
def plain():
    return OmegaConf.to_container(composed(), resolve=False)


@pytest.fixture(scope="module")
def of_pictures():
    return OmegaConf.to_container(composed(*PICTURES), resolve=False)


def with_key(plain: dict, key: str, value):
    cfg = OmegaConf.create(plain)
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


@pytest.mark.parametrize("group, name", [(g, n) for g in catalogue.GROUPS[:-2] for n in catalogue.groups()[g] if g != "sweep"])
def test_every_choice_composes_and_is_typed(group, name):
    extra = {"model": ["data=bandit"], "data": ["model=bandit"]}.get(group, []) if name == "bandit" else []
    extra += ["reward.path=x"] if group == "reward" and name in ("model", "hpsv2", "imagereward") else []
    extra += ["data=tiny-pictures", "model=tiny-diffusion"] if group == "reward" and name in PICTURE_REWARDS else []
    extra += PICTURES if group == "algo" and "llm" not in catalogue.modalities(catalogue.algo_info(name)) else []
    extra += ["algo=grpo"] if (group, name) == ("source", "rollout") else []
    extra += PICTURES if group == "source" and name in catalogue.OF_PICTURES or (group, name) == ("noise", "states") else []
    extra += {"best_of": ["algo=sft"], "states": ["source=self_play_states"]}.get(name, []) if group in ("source", "noise") else []
    if group == "trajectory" or (group, name) in (("source", "trajectories"), ("source", "candidates")):
        extra += [*PICTURES, "algo=spo_diffusion" if name in ("spo", "gradspo", "candidates") else "algo=flow_grpo"]
    extra += [*PICTURES, "model.user_width=2"] if (group, name) == ("adapter", "user") else []
    extra += PICTURES if (group, name) == ("sampler", "negative") else []
    extra += ["model.user_width=2"] if (group, name) == ("algo", "ppd") else []
    moves = {"round": ["source=rounds"], "past": ["source=rounds"], "stage": ["transforms=curriculum"]}
    extra += moves.get(name, []) if group == "reference" else []
    keys = catalogue.resolved_keys(group, name) if group in ("model", "data") else {}
    extra += PICTURES[1:] if group == "model" and keys["kind"].value == "diffusion" else []
    extra += PICTURES[:1] if group == "data" and keys["pictures"].value == "true" else []
    missing = (group, name) == ("experiment", "smollm2_real-pairs") or group == "data" and keys["path"].value == "???"
    extra += ["data.path=x"] if missing else []
    used_by = {"dpo": "tgdpo", "dpo_and_reverse": "align_distil", "reward": "mpo_mixed"}
    extra += [f"algo={used_by[name]}"] if group == "stages" and name in used_by else []
    text = (catalogue.conf_dir() / group / f"{name}.yaml").read_text()
    extra += ["stages=reward"] if group == "transforms" and "stage:reward" in text else []
    assert typed(composed(f"{group}={name}", *extra), "train", name).algo["name"] == name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    assert isinstance(typed(composed(*NEEDED.get(command, []), command=command), command, "dpo"), COMMANDS[command])


@pytest.mark.parametrize("key", sorted(CHOICES))
def test_every_choice_key_refuses_a_typo_by_name(key, plain):
    typo, command = CHOICES[key][-1] + "x", next(c for c, schema in COMMANDS.items() if key in all_keys(schema))
    base = plain if command == "train" else OmegaConf.to_container(composed(*NEEDED[command], command=command), resolve=False)
    with pytest.raises(UserError) as caught:
        typed(with_key(base, key, typo), command, "dpo")
    assert str(caught.value) == f"{key}={typo} is none of {', '.join(CHOICES[key])}; did you mean '{key}={CHOICES[key][-1]}'?"


@pytest.mark.parametrize("key", sorted(key for key, *_ in BOUNDS))
def test_every_bound_refuses_by_name(key, plain):
    value = {"optim.betas": [2.0], "model.latent": [0], "trajectory.window": [0]}.get(key, -1)
    command = next(c for c, schema in COMMANDS.items() if key in all_keys(schema))
    base = plain if command == "train" else OmegaConf.to_container(composed(*NEEDED[command], command=command), resolve=False)
    with pytest.raises(UserError, match=rf"^{key}=\S+: it must be (at least|above|in|0|two|a share|\[channels)"):
        typed(with_key(base, key, value), command, "dpo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_refuses_a_neighbour_by_its_full_name(command):
    base = OmegaConf.to_container(composed(*NEEDED.get(command, []), command=command), resolve=False)
    cfg = OmegaConf.create(base)
    for key in all_keys(COMMANDS[command]):
        OmegaConf.update(cfg, f"{key}_", 1, force_add=True)
        with pytest.raises(UserError) as caught:
            typed(cfg, command, "dpo")
        assert str(caught.value) == f"unknown key '{key}_'; did you mean '{key}'?"
        block, _, last = key.rpartition(".")
        del (OmegaConf.select(cfg, block) if block else cfg)[f"{last}_"]


def test_wrong_types_say_what_is_expected():
    assert refusal("optim.lr=high") == "optim.lr=high: it must be a number, such as 1e-4"
    assert refusal("optim.lr=") == "optim.lr='': it must be a number, such as 1e-4"
    assert refusal("seed=true") == "seed=true: it must be a whole number"
    assert refusal("train.self_check=maybe") == "train.self_check=maybe: it must be true or false"
    assert refusal("train.self_check=1.5") == "train.self_check=1.5: it must be true or false"
    assert refusal("optim.betas=0.9") == "optim.betas=0.9: it must be a list, such as optim.betas=[...]"
    assert refusal("model.path=[a]") == 'model.path=["a"]: it must be text'
    assert refusal("model.path={a:1}") == 'model.path={"a":1}: it must be text'
    assert refusal("seed=null") == "seed=null: it must be something else than null"
    assert refusal("model.lora=null").endswith("model.lora is a block of keys; set one of them, such as model.lora.enabled=...")
    assert refusal("seed=${nope}") == "seed: Interpolation key 'nope' not found"
    assert "PREFOPT_NO_SUCH" in refusal("model.path=${oc.env:PREFOPT_NO_SUCH}")
    assert refusal(command="eval") == "run has no value; give it one: run=..."


def test_references_between_keys_are_resolved():
    cfg = typed(composed("model=tiny-lm-lora", "seed=${train.log_every}"), "train", "dpo")
    assert cfg.optim.lr == cfg.model.learning_rate and cfg.seed == 1


@pytest.mark.parametrize("overrides, said", [
    (("model=bandit",), "Set both, or neither"),
    (("data=bandit",), "Set both, or neither"),
    (("data=jsonl",), "data.path has no value, and data=jsonl needs one; give a file"),
    (("data=hh-rlhf", "data.path=null"), "give a hub id or a folder"),
    (("data=hh-rlhf", "data.label_noise=0.1"), "data.label_noise=0.1 works on generated data only"),
    (("data=hh-rlhf", "data.length_bias=0.1"), "data.length_bias=0.1 works on data=tiny-feedback only"),
    (("model.lora.adapter=x",), "set model.lora.enabled=true"),
    (("model=bandit", "data=bandit", "model.lora.enabled=true"), "takes no LoRA adapter"),
    (("reference.policy=base",), "reference.policy=base is the model without its adapter"),
    (("algo=kto", "train.batch_size=1"), "train.batch_size=1: KTO needs at least 2 rows per step"),
    (("model.attention=flash_attention_2",), "use model.attention=sdpa"),
])
def test_combinations_that_cannot_work(overrides, said):
    assert said in refusal(*overrides)


@pytest.mark.parametrize("settings, said", [
    ({}, "names no class; its YAML needs a line `_target_"),
    ({"_target_": "os.system"}, "set trust.packages=[os]"),
    ({"_target_": "DPO", "beta": 0.1}, "does not name a class"),
    ({"_target_": "prefopt.objectives.pairwise.DPO", "bta": 1}, "algo.bta is no setting of DPO; did you mean 'algo.beta'?"),
    ({"_target_": "prefopt.objectives.pairwise.DPO", "beta": True}, "algo.beta=true: it must be a finite number"),
    ({"_target_": "prefopt.objectives.pairwise.DPO", "beta": None}, "algo.beta=null: it must be a finite number"),
    ({"_target_": "prefopt.objectives.pairwise.DPO", "beta": float("nan")}, "it must be a finite number"),
    ({"_target_": "prefopt.objectives.pairwise.IPO", "length_normalize": "yes"}, "algo.length_normalize=yes: it must be true or false"),
    ({"_target_": "prefopt.objectives.pairwise.DPO", "beta": 0}, "algo.beta=0: DPO needs beta > 0"),
])
def test_algo_settings(settings, said):
    with pytest.raises(UserError) as caught:
        check_algo(settings, [], "mine")
    assert said in str(caught.value)


ALGOS = catalogue.groups()["algo"]


@pytest.mark.parametrize("slug", [slug for slug in ALGOS if "beta" in catalogue.algo_info(slug).fields])
def test_beta_below_zero_is_refused_with_the_rule(slug):
    """And 0 as well, where it is a scale; where beta is the weight of a penalty, 0 switches that off."""
    settings, info = in_nats(catalogue.load_yaml("algo", slug), SD15), catalogue.algo_info(slug)
    settings.pop("defaults", None)
    for beta in (-0.1, 0.0) if "beta > 0" in info.require else (-0.1,):
        with pytest.raises(UserError, match=rf"^algo\.beta={beta}: {info.name} needs beta >=? 0; the default is "):
            check_algo(settings | {"beta": beta}, [], slug)


@pytest.mark.parametrize("slug", [slug for slug in ALGOS if not catalogue.algo_info(slug).needs_reference])
@pytest.mark.parametrize("key, value", [("policy", "base"), ("refresh", "round"), ("store", "on")])
def test_a_reference_is_refused_where_none_is_read(slug, key, value, plain, of_pictures):
    settings = catalogue.load_yaml("algo", slug)
    settings.pop("defaults", None)
    cfg = with_key(plain if "llm" in catalogue.modalities(catalogue.algo_info(slug)) else of_pictures, "algo", settings)
    asked = catalogue.algo_info(slug).quantities
    cfg.teacher.path = "x" if "teacher" in asked else None
    cfg.teacher.reverse = "x" if "distance" in asked.get("teacher", ()) else None
    cfg.source.kind = "trajectories" if catalogue.algo_info(slug).stepwise else cfg.source.kind
    OmegaConf.update(cfg, f"reference.{key}", value)
    with pytest.raises(UserError) as caught:
        typed(cfg, "train", slug)
    said = str(caught.value)
    assert said.startswith(f"reference.{key}={value}: ") and "no reference; use reference." in said
    OmegaConf.update(cfg, f"reference.{key}", "off" if key == "store" else {"policy": "initial", "refresh": "never"}[key])
    assert typed(cfg, "train", slug).algo["name"] == slug


@pytest.mark.parametrize("slug", [slug for slug in ALGOS if "llm" not in catalogue.modalities(catalogue.algo_info(slug))])
def test_what_is_about_pictures_is_refused_on_texts(slug):
    """By its settings per latent dim; by what it is where these were overridden."""
    if not catalogue.algo_info(slug).stepwise:
        with pytest.raises(UserError, match="makes no pictures; choose model=tiny-diffusion or another|model=tiny-lm writes texts"):
            typed(composed(f"algo={slug}"), "train", slug)
    if catalogue.algo_info(slug).pictures:
        numbers = [f"algo.{key}=0.1" for key, value in catalogue.algo_settings(slug).items() if per_mean(value) is not None]
        with pytest.raises(UserError, match="is about the denoising errors of pictures, and model=tiny-lm makes none; choose model="):
            typed(composed(f"algo={slug}", *numbers), "train", slug)


def rows_of(tmp_path, *rows: dict) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}"]


ONE = {"prompt": "a", "completion": "b", "label": True}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LIST = {"prompt": "a", "completions": ["b", "c", "d"]}


@pytest.mark.parametrize("algo, rows, said", [
    ("dpo", [ONE], "row 1: this is a unary row, and the objective needs pairs (chosen and rejected). Choose other data, or an algorithm "
                   "for unary data, such as algo=kto"),
    ("lipo", [ONE], "the objective needs rankings (completions with scores or ranks) or pairs"),
    ("lipo", [LIST], "row 1: 'completions' needs 'scores' or 'ranks' (prefopt label writes scores). Mend the row"),
    ("kto", [{"prompt": "a", "completion": "b"}], "row 1: this is a demonstration row, and the objective needs labelled completions"),
    ("sft", [{"prompt": "a"}], "such as algo=online_dpo"),
    ("ipo", [PAIR | {"margin": 1.0}], "row 1: the data has a margin, which this objective does not use"),
    ("lipo", [LIST | {"scores": [1, 2, 3]}], None),
    ("lipo", [PAIR], None),
    ("dpo", [LIST | {"ranks": [3, 1, 2]}], None),
    ("kto", [ONE], None),
    ("dpo", [PAIR, ONE], None),  # only the first row is looked at here; every row is when they are loaded
])
def test_the_first_row_of_a_file_tells_whether_it_fits(algo, rows, said, tmp_path):
    cfg = typed(composed(f"algo={algo}", *rows_of(tmp_path, *rows)), "train", algo)
    if said is None:
        return check_data(cfg)
    with pytest.raises(UserError) as caught:
        check_data(cfg)
    assert said in str(caught.value)


@pytest.mark.parametrize("overrides, said", [
    (("algo=dpo", "data=kto-mix-14k"), "data=kto-mix-14k: the objective needs pairs (chosen and rejected), and data.columns has none of "
                                       "these (it has prompt, completion, scores, ranks, label, weight, margin"),
    (("algo=pro", "data=kto-mix-14k"), "the objective needs rankings (completions with scores or ranks) or pairs"),
    (("algo=lipo", "data=ultrafeedback", "data.columns.chosen=null", "data.columns.scores=null", "data.columns.ranks=null"),
     "needs rankings (completions with scores or ranks) or pairs, and data.columns has none of these"),
    (("algo=dpo", "data=kto-mix-14k", "data.columns.completion=null", "data.columns.prompt=null"), "Choose other data, or set the columns"),
    (("algo=kto", "data=kto-mix-14k"), None),
    (("algo=sft", "data=kto-mix-14k"), None),
    (("algo=lipo", "data=ultrafeedback-ranked"), None),
    (("algo=lipo", "data=ultrafeedback"), None),  # a pair is a list of two
    (("algo=online_dpo", "data=kto-mix-14k", "reward=model", "reward.path=x"), None),  # it takes the prompts only
])
def test_columns_tell_whether_a_dataset_fits(overrides, said):
    cfg = typed(composed(*overrides), "train", overrides[0].partition("=")[2])
    if said is None:
        return check_data(cfg)
    with pytest.raises(UserError) as caught:
        check_data(cfg)
    assert said in str(caught.value)


@pytest.mark.parametrize("override, said", [
    ("data=mine", "there is no data=mine; known: bandit, dpo-mix-7k, emoji, helpsteer2, hh-rlhf"),
    ("hydra/launcher=prefop", "there is no hydra/launcher=prefop; did you mean 'hydra/launcher=prefopt'?"),
    ("hydra.run.dr=x", "unknown key 'hydra.run.dr'; did you mean 'hydra.run.dir'?"),
    ("+algo=ipo", "algo is chosen already; write algo=... without the +"),
    ("algo@mine=ipo", "algo@mine: prefopt has no packages; write algo=..."),
    ("optim", "'optim' is no override; write key=value, such as optim=..."),
    ("tiny-lm", "'tiny-lm' is no override; did you mean 'model=tiny-lm'?"),
    ("model=3", "model=3: a group is chosen by name, such as model=bandit (prefopt list model)"),
    ("=3", "=3: a group is chosen by name, such as algo="),
    ("batch_size=3", "unknown key 'batch_size'; did you mean 'sampler.batch_size' or 'train.batch_size'?"),
])
def test_what_hydra_refuses_is_rephrased(override, said):
    with pytest.raises(Exception) as caught:
        composed(override)
    sentence = rephrase(caught.value, [override], "train")
    assert sentence.startswith(said) and "\n" not in sentence


def test_unknown_keys_prefer_siblings_then_the_same_name_then_lookalikes():
    known = ["a", "a.rate", "a.size", "b", "b.rate", "b.size", "b.deep", "b.deep.only"]
    assert unknown_key("a.rat", known) == "unknown key 'a.rat'; did you mean 'a.rate'?"
    assert unknown_key("only", known) == "unknown key 'only'; did you mean 'b.deep.only'?"
    assert unknown_key("size", known) == "unknown key 'size'; did you mean 'a.size' or 'b.size'?"
    assert unknown_key("b.deap.only", known) == "unknown key 'b.deap.only'; did you mean 'b.deep.only'?"
    assert unknown_key("a.xyz", known) == "unknown key 'a.xyz'; there are a.rate, a.size"
    assert unknown_key("xyz", known) == "unknown key 'xyz'; there are a, b"


def test_dotted_names():
    assert dotted({"a": 1, "b": {"c": 2, "d": {}}}) == ["a", "b", "b.c", "b.d"]


def test_options_and_overrides_in_any_order():
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = refuse
    args = parse(parser, ["algo=dpo", "-m", "+experiment=x", "--config-dir", "mine", "seed=1"])
    assert (args.multirun, args.config_dir, args.overrides) == (True, "mine", ["algo=dpo", "experiment=x", "seed=1"])
    assert parse(parser, ["--info", "algo=dpo"]).info == "all" and parse(parser, ["--info", "config"]).info == "config"
    assert parse(parser, ["~debug", "~hydra.job"]).overrides == ["~debug", "~hydra.job"]
    for words, said in [(["--mutlirun"], "unknown option --mutlirun; did you mean '--multirun'?"),
                        (["--cfg"], "--cfg: expected one argument"), (["~seed"], "~seed: a key cannot be taken away"),
                        (["--experimental-rerun", "x"], "reads a pickle")]:
        with pytest.raises(UserError) as caught:
            parse(parser, words)
        assert said in str(caught.value)
