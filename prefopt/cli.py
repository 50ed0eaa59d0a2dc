"""prefopt <command> [overrides]. Thin: heavy imports happen inside commands, so help and listings answer at once."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from prefopt import __version__
from prefopt.errors import RunFailed, UserError, nearest

HELP = f"""prefopt {__version__}: train, sweep and compare preference-optimisation methods

usage: prefopt <command> [overrides]

  train [overrides]        one run, or with -m a sweep       prefopt train algo=simpo model=tiny-lm
  plan [overrides]         memory, FLOPs and time of a run   prefopt plan algo=dpo model=llama3-8b hardware=8xgpu
  launch --print           commands of a run, by machine     prefopt launch --print hardware=2x8xh100_zero3
  eval run=FOLDER          judge a finished run              prefopt eval run=runs/...
  sample run=FOLDER        let a trained policy answer       prefopt sample run=runs/... prompt="..."
  label [overrides]        rows relabelled by a reward model prefopt label reward.path=runs/rm data=... output=rows.jsonl
  compare FOLDER...        runs or sweeps side by side       prefopt compare runs/...-sweep
  runs ls|show|verify|rm   the runs of a folder              prefopt runs ls
  sweep status|resume      a sweep's jobs, and going on      prefopt sweep status runs/...-sweep
  store ls|verify|gc       log-probs kept on disk            prefopt store ls
  merge RUN... [options]   add up the weights of runs        prefopt merge runs/a runs/b weights=[0.5,0.5] output=runs/ab
  export RUN [options]     a model for other programs        prefopt export runs/a style=model output=my-model
  list [group]             what there is                     prefopt list algo --view pairs
  show NAME                one algorithm, model or dataset   prefopt show dpo
  data check [overrides]   look at data as a model sees it   prefopt data check data=jsonl data.path=pairs.jsonl
  doctor                   is this machine ready?
  completion SHELL         shell completion for bash, zsh or fish

Overrides are Hydra's: a group (algo=dpo), a key (optim.lr=1e-4), +experiment=NAME, -m algo=dpo,ipo seed=0,1,2,
hydra.run.dir=FOLDER, --config-dir FOLDER for your own groups, --cfg job to print the composed config, --info.
prefopt <command> --help says more about a command and lists its groups and keys.
"""

COMMANDS = ("train", "plan", "launch", "eval", "sample", "label", "compare", "runs", "sweep", "store", "merge", "export", "list", "show",
            "data", "doctor", "completion")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 the run failed, 2 the user can mend it, 130 or 143 stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: dispatch(argv))


def dispatch(argv: list[str]) -> Any:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return None
    command, rest = argv[0], argv[1:]
    if command in COMMANDS and {"-h", "--help"} & set(rest):
        from prefopt.config.command_help import help_text

        print(help_text(command))
    elif command == "--version" or (command in COMMANDS and "--version" in rest):
        print(f"prefopt {__version__}")
    elif command in ("train", "plan", "eval", "sample", "label"):
        return _hydra(command, rest)
    elif command == "launch":
        if "--print" not in rest:
            raise UserError("prefopt launch prints what prefopt train would start, and starts nothing: prefopt launch --print ...")
        return _hydra("launch", [word for word in rest if word != "--print"])
    elif command == "data":
        if rest[:1] != ["check"]:
            said = f"unknown command 'data {rest[0]}'" if rest else "prefopt data is no command of its own"
            raise UserError(f"{said}; did you mean 'data check'?")
        return _hydra("data_check", rest[1:])
    elif command == "compare":
        from prefopt.report.compare import main as compare

        compare(rest)
    elif command == "runs":
        from prefopt.evaluation.runs import main as runs

        runs(rest)
    elif command == "sweep":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from prefopt.launch.sweep import main as sweep

        return sweep(rest)
    elif command == "store":
        from prefopt.evaluation.store import main as store

        store(rest)
    elif command == "merge":
        from prefopt.evaluation.merge import main as merge

        merge(rest)
    elif command == "export":
        from prefopt.evaluation.export import main as export

        export(rest)
    elif command == "list":
        from prefopt.config.listing import list_command

        print(list_command(rest))
    elif command == "show":
        from prefopt.config.listing import show_command

        print(show_command(rest))
    elif command == "doctor":
        from prefopt.config.doctor import doctor_text

        text, healthy = doctor_text()
        print(text)
        if not healthy:
            raise SystemExit(1)
    elif command == "completion":
        from prefopt.config.completion import script

        print(script(rest[0] if rest else ""))
    elif command == "__complete":
        from prefopt.config.completion import answer

        print("\n".join(answer()))
    else:
        raise UserError(f"unknown command '{command}'{nearest(command, COMMANDS)} (prefopt --help lists them)")
    return None


def _hydra(command: str, overrides: list[str]) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from prefopt.config.hydra_code import own_code_only
    from prefopt.launch.app import run

    with own_code_only():
        return run(command, overrides)


def _print(message: str, code: int) -> None:
    print(f"prefopt: {message}", file=sys.stderr)


def guarded(work: Callable[[], Any], say: Callable[[str, int], None] = _print) -> int:
    """Runs `work`; turns what a user can mend into one sentence, for `say`, and exit code 2, a failed run into exit code 1."""
    try:
        result = work()
    except UserError as error:
        return _say(error, error.exit_code, say)
    except RunFailed as error:
        return _say(error, error.exit_code, say)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _say(f"the disk is full ({error.filename or 'writing'}); free some space and repeat the command, it goes on from the "
                        "last checkpoint", 2, say)
        if error.errno == errno.EPIPE:  # the reader of `prefopt list | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno in (errno.EACCES, errno.EROFS):
            return _say(f"{error.filename}: cannot be written here ({error.strerror}); choose another hydra.run.dir", 2, say)
        if error.errno == errno.ENAMETOOLONG:
            return _say(f"{str(error.filename)[:60]}... is too long for the name of a file; give a shorter one", 2, say)
        raise
    except SystemExit as end:  # Hydra after --help and --info, a worker with its own exit code
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return _say("stopped", 130, say)
    if isinstance(result, dict) and "stopped" in result:
        return 130 if result["stopped"] == "SIGINT" else 143
    return 0


def _say(message: object, code: int, say: Callable[[str, int], None]) -> int:
    if os.environ.get("PREFOPT_DEBUG") == "1" and sys.exc_info()[1] is not None:
        raise  # the traceback, for those who ask for it
    say(str(message), code)
    return code


if __name__ == "__main__":
    sys.exit(main())
