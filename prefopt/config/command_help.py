"""`prefopt <command> --help`: what it takes, read from `conf/` and the schema. Imports neither torch nor Hydra."""

from __future__ import annotations

from prefopt.config import catalogue, listing
from prefopt.config.completion import primary_groups
from prefopt.config.schema import COMMANDS, ReferenceConfig, config_of

SWEEP = "\n  -m, --multirun       a sweep: one job for each combination of comma lists, as in -m algo=dpo,ipo seed=0,1,2"
HYDRA_OPTIONS = """
  --cfg job            print the config as composed, run nothing; with --resolve also its ${...} references
  --info               print where the config comes from
  --config-dir FOLDER  your own groups (FOLDER/algo/mine.yaml is algo=mine); hydra.searchpath=[file:///FOLDER] does the same
  --hydra-help         the other options of Hydra"""

EXAMPLES = {
    "train": """examples
  prefopt train algo=simpo model=tiny-lm
  prefopt train debug=fast                                    four steps, to see that everything holds together
  prefopt train +experiment=dpo_llama3-8b                     a paper's recipe
  prefopt train -m algo=dpo,ipo seed=0,1,2                    a sweep
  prefopt train data=jsonl data.path=pairs.jsonl model=smollm2-135m
  prefopt train hydra.run.dir=runs/mine                       the run's folder; the same command continues a killed run""",
    "plan": "examples\n  prefopt plan algo=dpo model=smollm2-135m data=jsonl data.path=pairs.jsonl\n"
            "  prefopt plan model=llama3-8b hardware=8xgpu hardware.memory_gb=80 hardware.peak_tflops=989   for another machine\n"
            "  prefopt plan --dry-run model=llama3-8b hardware=64x8_zero3   one step on 512 processes that are not there",
    "launch": "examples\n  prefopt launch --print hardware=8xh100_zero3_slurm hydra.run.dir=runs/mine           the batch script\n"
              "  prefopt launch --print hardware=2x8xh100_zero3 hydra.run.dir=/shared/runs/mine       the command for each machine",
    "eval": "example\n  prefopt eval run=runs/mine prompts=128 sampler=greedy",
    "sample": "example\n  prefopt sample run=runs/mine prompt=\"Tell me about the fox at the harbour.\" count=2",
    "label": "example\n  prefopt label reward.path=runs/rm data=jsonl data.path=pairs.jsonl output=labelled.jsonl labels=soft",
    "data_check": "example\n  prefopt data check data=jsonl data.path=pairs.jsonl model=smollm2-135m",
}

# Commands that have no file of their own in `conf/`.
HEADERS = {"plan": ["prefopt plan: what a run would take in memory, FLOPs, time and disk, before anything is loaded. Takes what prefopt "
                    "train takes."],
           "launch": ["prefopt launch --print: the commands or the batch script with which prefopt train would start a run on its "
                      "machines. Takes what prefopt train takes; starts nothing."]}

OTHERS = {
    "list": """prefopt list [GROUP] [--view VIEW] [--needs NEED] [--modality MODALITY]: what there is to choose from

  GROUP          one of {groups}
  --view VIEW    algorithms that read this kind of data: {views}
  --needs NEED   algorithms that need this (no-NEED: that do not): {needs}
  --modality M   algorithms that make sense for models of this kind: {modalities}""",
    "compare": """prefopt compare FOLDER... [--output FILE] [--different-data]: runs or whole sweeps side by side

  Runs that differ in more than their seed are methods. Prints a table with intervals over seeds and prompts, and which differences are
  significant; writes compare.html with the reward-KL frontier and the costs. Runs over different data are refused without --different-data.

example
  prefopt train -m algo=dpo,ipo,simpo,kto seed=0,1,2 hydra.sweep.dir=runs/four
  prefopt compare runs/four""",
    "runs": """prefopt runs ls [FOLDER] | show RUN | verify FOLDER... | rm RUN... [--checkpoints]: what has been run

  ls           the runs in FOLDER (by default runs) and below: state, step, last figure, size, when they last wrote; a run that was
               going on and has been silent for ten minutes is called killed
  show         command, state, last evaluation, checkpoints
  verify       read all checkpoints and list damaged ones; exit code 1 if there are any
  rm           remove a run's folder; --checkpoints leaves everything else, and the run can then not go on. A running one is refused

example
  prefopt runs ls runs/four""",
    "sweep": """prefopt sweep status FOLDER | resume FOLDER [--only-unfinished] [overrides]: a sweep that prefopt train -m has begun

  status       each job's state, step, last loss and figure, as they are now, also if the sweep's own process was killed
  resume       run the command of the sweep again: jobs that have finished are left alone, stopped ones go on from their checkpoints, failed
               ones are tried again (not with --only-unfinished). Overrides replace words of the command, such as hydra.launcher.jobs=2

example
  prefopt sweep status runs/four
  prefopt sweep resume runs/four hydra.launcher.jobs=2""",
    "store": """prefopt store ls | verify | gc [--limit-gb X] [--all]: the reference store, log-probs that are computed once for all runs

  ls           whose log-probs are there: size, entries, when last used
  verify       read all of it and list damaged files; exit code 1 if there are any
  gc           remove damaged files, what killed runs left, and what was not used for longest beyond the limit ({limit:g} GB,
               or --limit-gb); --all removes everything. What is missing is computed again by the next run that needs it

The store is the folder $PREFOPT_STORE, by default ~/.cache/prefopt/store.""",
    "merge": """prefopt merge RUN RUN... weights=[W,W...] output=FOLDER: one model that is a linear combination of finished runs

  weights      a number for each run, in their order; for whole models and tables they add up to 1
  output       a new folder; whole models are used with model.path=FOLDER, LoRA adapters with model.lora.adapter=FOLDER

  Adapters are put side by side, so their ranks add up and the merged change is exactly the combination of theirs.

example (COFS-DPO: one run for each domain, then both)
  prefopt merge runs/first runs/second weights=[0.5,0.5] output=runs/both""",
    "export": """prefopt export RUN style=STYLE output=PATH: what a run has trained, for other programs

  style        model: a plain folder of transformers or diffusers, LoRA merged, with a model card; or the LoRA of a run on pictures as one
               file: diffusers, kohya (sd-scripts, Forge and others) or comfyui say how its weights are named; alpha is multiplied in
  output       a new folder, or a new file

of style=model
  checkpoint   last, best (of a run with train.keep_best) or a step [last]
  dtype        fp32 or bf16: of the weights on disk [fp32]
  push         name on the Hugging Face hub to upload the folder to, such as me/my-model (needs a login)
  private      true or false: whether a new repository there is [true]

examples
  prefopt export runs/mine style=model dtype=bf16 output=my-model
  prefopt export runs/mine style=comfyui output=ComfyUI/models/loras/mine.safetensors""",
    "show": """prefopt show NAME [model=NAME] [model.resolution=N]: all about an algorithm, model, dataset, ...

  model, model.resolution   of an algorithm for pictures: what its settings per latent dim, such as beta: 5000/D, are for that model

examples
  prefopt show dpo
  prefopt show diffusion_dpo model=sdxl""",
    "doctor": "prefopt doctor: versions, devices, folders and keys of this machine; exit code 1 if something must be mended",
    "completion": 'prefopt completion bash|zsh|fish: a completion script\n\nexample\n  eval "$(prefopt completion bash)"',
}


def help_text(command: str) -> str:
    """Help of one command."""
    if command in OTHERS:
        words = {"groups": catalogue.GROUPS, "views": catalogue.VIEWS, "needs": catalogue.NEEDS, "modalities": catalogue.MODALITIES}
        limit = ReferenceConfig().store_limit_gb
        return OTHERS[command].format(limit=limit, **{key: ", ".join(value) for key, value in words.items()})
    command = "data_check" if command == "data" else command
    assert command in COMMANDS
    config = config_of(command)
    entries = catalogue.load_yaml(".", config)["defaults"]
    chosen = {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    names = catalogue.groups()
    rows = [(f"{g}={chosen[g] or ''}", ", ".join(names[g])) for g in primary_groups(command)]
    keys = {k: line for k, line in catalogue.resolved_keys(".", config).items() if k.partition(".")[0] != "hydra"}
    return "\n".join([
        *(HEADERS.get(command) or catalogue.header(".", config)), "",
        f"usage: prefopt {command.replace('_', ' ')} [options] [GROUP=NAME ...] [KEY=VALUE ...]",
        "", "groups (with the default choice; prefopt show NAME lists the keys that a choice brings, such as algo.beta)",
        *listing.table(rows, "  "), "", "keys", *listing.keys_text(keys, "  "), "",
        "options (Hydra's; in any order with the overrides)" + (SWEEP if command == "train" else "") + HYDRA_OPTIONS, "", EXAMPLES[command],
    ])
