"""The commands but for peftsweep-doctor. Nothing here imports torch before a trial must run."""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep import command_line, completion, doctor, errors, options, shorthand
from peftsweep.config import checks, experiment, fill
from peftsweep.config import compose as configuration
from peftsweep.errors import EXIT_CODES, InputError, Unwritable, check_platform, printable, unreadable
from peftsweep.observe import streams
from peftsweep.study import store, sweep_record
from peftsweep.use import chat_with, show_rows

if TYPE_CHECKING:
    from peftsweep.study.record import Result

NOT_RUN = 3  # the exit code if a trial of the command was not run
OTHER_COMMANDS = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help"}
HELP = """\
peftsweep: sweep parameter-efficient fine-tuning configurations and learn which one to use.

usage: peftsweep [KEY=VALUE ...] [-m]      a comma-separated VALUE is swept, glob(*) sweeps a whole group

{groups}

Keys: every key of a group and of the trial, with its value now: peftsweep --cfg job; what one is: peftsweep --help KEY
  train.steps=500  train.epochs=3  train.learning_rate=1e-4  train.batch_size=16  method.r=16
  dataset.path=FILE  dataset.samples=1000  study=NAME  label=NAME  seed=0  device=auto
  hydra.launcher.workers=2 .timeout=2h .retries=1 .limit=10 .deadline=8h: where and for how long trials run
  hydra/launcher=slurm, ray_cluster, or any other of Hydra's: on a cluster
  dry_run=true lists the trials (--json: as JSON); force=true runs done ones again; quiet=true prints one line

Examples:
  peftsweep method=lora method.r=8,16,32 quant=4bit -m         three trials on the embedded model
  peftsweep 'method=glob(*)' seed=0,1,2 -m                     every method, three seeds
  peftsweep model=./FOLDER dataset=rows.jsonl method.r=8,16 -m   your own model (or model=ORG/NAME) and rows
  peftsweep dataset=rows.csv 'dataset.prompt="{{question}}"' 'dataset.answer="{{answer}}"'
                                                               rows of other columns than those that are recognised
  peftsweep targets=qv,qkvo,mlp,all_linear dry_run=true -m     what would run, and how large it is
  peftsweep --config-dir mine method=mymethod                  your own yaml: mine/method/mymethod.yaml

  peftsweep method.r=2,8,32 targets=q,qv,all_linear halving.min_steps=10 -m
                                                               only the best third goes on at each rung

peftsweep-doctor                                               what this machine can do; --version: the versions
eval "$(peftsweep --completion bash)"                          the tab key completes; also zsh, fish
Then: peftsweep-collect                                        tables and plots of every study
"""


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _product(*numbers: Any) -> Any:
    """Of numbers; of anything else 1, which every key may be: the key that holds it is refused by its own check."""
    known = all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
    return math.prod(numbers) if known else 1


# What conf/ calculates with. A job of another launcher composes its point in a process that only imports this module.
OmegaConf.register_new_resolver("mul", lambda a, b: _product(a, b), replace=True)
OmegaConf.register_new_resolver("share", lambda a, b: round(_product(a, b)), replace=True)
OmegaConf.register_new_resolver("folders", lambda root: ",".join(map(_quoted, experiment.folders(root))), replace=True)
OmegaConf.register_new_resolver("choose", lambda key, options: options[getattr(key, "name", key)], replace=True)


def main() -> None:
    """``peftsweep``: exit code 0 all done, 1 a trial failed, 2 wrong input, 3 some were not run, 130 interrupted."""
    streams.settle()
    sweep_record.command_begins()
    if {"--help", "-h"} & set(sys.argv[1:]):
        sys.exit(_run_command(_help))
    if "--version" in sys.argv[1:]:
        print(doctor.version_text())
        return
    if "--completion" in sys.argv[1:]:
        sys.exit(_run_command(_completion))
    # Every command is a sweep. Hydra would accept -m at the end only, and without it would call a comma in one
    # override ambiguous whenever another is wrong.
    words = [word for word in sys.argv if word not in ("-m", "--multirun")]
    others = {word.partition("=")[0] for word in words[1:]} & OTHER_COMMANDS
    sys.argv = words if others else [*words, "--multirun"]
    sys.exit(_run_command(_plan_as_json if "--json" in sys.argv else _hydra))


def _plan_as_json() -> int:
    """``--json``: the rows of plan.json on stdout, and what a dry run prints otherwise on stderr."""
    sys.argv.remove("--json")
    if not any(re.fullmatch(r"\+*dry_run=(true|yes|on|1)", word.lower()) for word in sys.argv):
        raise InputError("--json: only with dry_run=true; peftsweep-collect --json prints the answer of a study")
    with redirect_stdout(sys.stderr):
        code = _hydra()
    print(json.dumps([row for file in sweep_record.plans for row in json.loads(file.read_text("utf-8"))], indent=1))
    return code


def _completion() -> int:
    print(completion.script("".join(sys.argv[sys.argv.index("--completion") + 1 :][:1])), end="")
    return 0


def _help() -> int:
    """Print the help; of the keys, groups and options that are named beside ``--help`` what each is."""
    words = sys.argv[1:]
    own = command_line.own_folders(words)
    after = words[min(words.index(flag) for flag in ("--help", "-h") if flag in words) :]
    if not (named := command_line.named_beside_help(words) or command_line.named_beside_help(after, values=True)):
        print(help_text(words))
        return 0
    from peftsweep.reference import keys  # which takes a while, and of some keys imports torch

    method = next((word.partition("=")[2] for word in words if word.startswith("method=")), "lora")
    for word in named:
        print(keys.explain(word, method, own))
    return 0


def _hydra() -> int:
    fill.register()
    if not {"-sc", "--shell-completion"} & set(sys.argv):
        sys.argv[1:] = _checked(sys.argv[1:])
        own = command_line.own_folders(sys.argv[1:])
        if lacking := [folder for folder in own if not folder.is_dir()]:
            raise InputError(f"--config-dir {lacking[0]}: no such folder")
        command_line.import_from([*own, Path.cwd()])
        # Workers inherit the folder of own options: the command that repeats a trial must find the same options.
        os.environ[store.OWN_OPTIONS] = str(own[-1]) if own else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would else print as ten lines
    try:
        hydra.main(version_base="1.3", config_path=fill.conf_dir(), config_name="config")(_task)()
        code = 0
    except errors.NotRun:
        return NOT_RUN
    except (errors.SweepFailed, ValueError) as error:
        # Hydra's Optuna stops by a ValueError if every trial failed; each failure has been printed already.
        if not isinstance(error, errors.SweepFailed) and "No trials are completed" not in str(error):
            raise
        code = 1
    sweep_record.command_ends()
    return code or (NOT_RUN if sweep_record.not_run() else 0)


def _checked(words: Sequence[str]) -> list[str]:
    """The words of a command as Hydra is to read them."""
    conf = Path(fill.conf_dir())
    command_line.check_names(words, conf)
    shorthand.forget()
    checked = command_line.checked(shorthand.expanded(words, [conf, *command_line.own_folders(words)]), conf)
    command_line.check_twice(checked, conf)
    return checked


INTERRUPTED = EXIT_CODES[130]
_interrupts: list[int] = []


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the process at once during an import: an extension module in C++ that meets an exception may abort it.

    Else remember the interrupt, as what it interrupts may raise something else in its place.
    """
    if any(one.f_code.co_filename == "<frozen importlib._bootstrap>" for one, _ in traceback.walk_stack(frame)):
        sys.stdout.flush()
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def _run_command(command: Callable[[], Any]) -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        return _print_errors_in_one_line(command)
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, Exception) and not _interrupts:
            raise
    print(INTERRUPTED, file=sys.stderr)
    atexit.register(signal.signal, signal.SIGINT, lambda *_: os._exit(130))  # at its exit an exception would be printed
    return 130


def _print_errors_in_one_line(command: Callable[[], Any]) -> int:
    try:
        check_platform()
        command_line.check_homes(sys.argv[1:])
        return int(command())
    except InputError as error:
        problem = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        own = command_line.own_folders(sys.argv[1:])
        problem = command_line.wrong_yaml(sys.argv[1:], only_chosen=True) or checks.one_line(error, own)
    except (OSError, Unwritable, ValueError, yaml.YAMLError) as error:
        reason = store.unwritable(error) or unreadable(error) or command_line.wrong_yaml(sys.argv[1:])
        if reason is None:
            raise
        problem = str(reason)
    print(f"peftsweep: {printable(problem)}", file=sys.stderr)
    return 2


def _task(cfg: DictConfig) -> None:
    """What another launcher of Hydra's than ours runs for each point, in a process that may be anywhere."""
    from peftsweep.sweep import engine

    hydra_config = HydraConfig.get()
    if (here := Path(hydra_config.runtime.cwd)).is_dir():
        os.chdir(here)  # all paths are relative to where the command runs, whatever hydra.job.chdir says
    sources = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
    command_line.import_from([*sources, Path.cwd()])
    one = configuration.trial(cfg, hydra_config.runtime.choices, hydra_config.overrides.task)
    sweeper: Any = OmegaConf.to_container(hydra_config.sweeper)
    engine.job(configuration.with_pruning(one, sweeper))


def run_one(overrides: list[str]) -> Result:
    """Run one trial from Python: see ``peftsweep.run``."""
    check_platform()
    sweep_record.command_begins()
    from peftsweep.sweep import sweep

    words = _one_point(overrides, "peftsweep.run")
    return sweep.run_alone(_trial(*words), store.with_own_options(words))


def _one_point(words: Sequence[str], taker: str) -> list[str]:
    """The words as Hydra is to read them; a sweep among them is refused."""
    checked = _checked(words)
    for word in OverridesParser.create().parse_overrides(checked):
        if word.is_sweep_override():
            raise InputError(f"{word.input_line}: {taker} takes one trial; a sweep is a command, peftsweep ... -m")
    return checked


def _trial(*words: str) -> configuration.Trial:
    cfg, words = _composed(*words)
    return configuration.checked(configuration.filled(cfg, cfg.hydra.runtime.choices, list(words)))


def _composed(*words: str) -> tuple[DictConfig, tuple[str, ...]]:
    command_line.import_from([Path.cwd()])
    words = tuple(_checked(words))
    try:
        cfg = compose(list(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(checks.one_line(error, command_line.own_folders(words))) from None
    checks.check_expanded(cfg, [word.lstrip("+~").partition("=")[0] for word in words])
    return cfg, words


def compose(overrides: list[str]) -> DictConfig:
    """The configuration that the words of a command line compose, with Hydra's own node."""
    fill.register()
    with hydra.initialize_config_dir(fill.conf_dir(), version_base="1.3"):
        return hydra.compose("config", overrides, return_hydra_config=True)


def help_text(arguments: list[str]) -> str:
    """The help, with the groups and options that conf/ and --config-dir hold now."""
    folders = [Path(fill.conf_dir())]
    folders += command_line.own_folders(arguments)
    lines = ["Groups: what a trial can choose, with its options (the default first)"]
    for group, question, default in options.groups(folders[0]):
        others = [name for name in options.names(group, folders) if name != default]
        lines.append(f"  {group:9} {question:24} {' '.join([default, *others])}")
    return HELP.format(groups="\n".join(lines))


def collect() -> None:
    """``peftsweep-collect``: tables and plots of studies."""
    streams.settle()

    def run() -> int:
        words = collect_parser().parse_args()
        _check_together(words)
        if words.memory_guide:
            from peftsweep.forecast import guide

            return guide.main(words.memory_guide, _trial, words.studies)
        from peftsweep.analysis import collect as collecting

        if words.prune:
            from peftsweep.analysis import prune

            return prune.main(words.studies, 1 if words.keep_best is None else words.keep_best, confirmed=words.yes)
        if words.forecast_report:
            from peftsweep.analysis import forecast_report

            return forecast_report.main(words.studies)
        if words.status:
            return collecting.status(words.studies, as_json=words.json)
        return collecting.main(
            collecting.Options(
                studies=words.studies,
                out=words.out,
                where=words.where,
                plots=not words.no_plots,
                kind="svg" if words.svg else "png",
                from_peft=words.from_peft,
                to_peft=words.to_peft,
                json=words.json,
                **({} if words.quality_loss is None else {"quality_loss": words.quality_loss}),
            )
        )

    sys.exit(_run_command(run))


def _check_together(words: argparse.Namespace) -> None:
    """Refuse options of ``peftsweep-collect`` of which one would not be heeded."""
    instead = ("status", "prune", "forecast_report", "memory_guide")
    chosen = [f"--{name.replace('_', '-')}" for name in instead if getattr(words, name)]
    if len(chosen) > 1:
        raise InputError(f"{' '.join(chosen)}: each is instead of the table; give one")
    for name, value in (("yes", words.yes or None), ("keep-best", words.keep_best)):
        if value is not None and not words.prune:
            raise InputError(f"--{name}: only with --prune")
    if words.json and chosen and not words.status:
        raise InputError(f"--json: not with {chosen[0]}")


def collect_parser() -> argparse.ArgumentParser:
    """The parser of ``peftsweep-collect``."""
    parser = command_line.OneLineParser(
        prog="peftsweep-collect", description="Turn the trials of studies into results.parquet, plots and a table."
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY_DIR", help="default: every study under multirun/")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also the trials of all: .parquet .csv .json .jsonl .sqlite .db"
    )
    where = "show, and write to --out, only these: \"choices.quant == '4bit'\""
    parser.add_argument("--where", metavar="EXPR", help=where)
    parser.add_argument("--no-plots", action="store_true", help="no plots and no report.html")
    parser.add_argument(
        "--quality-loss",
        type=command_line.number(lambda share: 0 <= share < 1, "from 0 to below 1"),
        metavar="SHARE",
        help="of the best score that advice may give up for speed (default: 0.05)",
    )
    parser.add_argument("--svg", action="store_true", help="plots as .svg instead of .png")
    parser.add_argument(
        "--json", action="store_true", help="print the answer (with --status: how studies stand) as JSON, nothing else"
    )
    parser.add_argument("--status", action="store_true", help="instead: how the studies stand, and what failed and why")
    parser.add_argument(
        "--forecast-report",
        action="store_true",
        help="instead: how far predicted seconds were from measured ones, and how often their interval held",
    )
    parser.add_argument(
        "--prune", action="store_true", help="instead: list the checkpoints, merged models and adapters to be removed"
    )
    parser.add_argument(
        "--keep-best",
        type=command_line.whole_number(0),
        metavar="N",
        help="with --prune: trials that keep adapter and merged model, by each evaluation (default: 1)",
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: remove them")
    parser.add_argument(
        "--from-peft", type=Path, metavar="DIR", help="results of PEFT's comparison on MetaMathQA, as a study"
    )
    parser.add_argument("--to-peft", type=Path, metavar="DIR", help="also the trials, as results of that comparison")
    parser.add_argument(
        "--memory-guide", metavar="MODEL", help="instead: which method and quantisation of it fits which GPU, predicted"
    )
    return parser


def data() -> None:
    """``peftsweep-data``: a dataset as two local files, to train and to test on; ``show``: rows as they are trained."""
    streams.settle()

    def run() -> int:
        if sys.argv[1:2] == ["show"]:
            options = show_rows.parser().parse_intermixed_args(sys.argv[2:])
            return show_rows.main(options, lambda *words: _trial(*_one_point(words, "peftsweep-data show")))
        from peftsweep.data import prepare

        words = vars(data_parser(prepare.FORMATS).parse_args())
        return prepare.main(compose([f"dataset={words.pop('dataset')}"]), prepare.Options(**words))

    sys.exit(_run_command(run))


def chat() -> None:
    """``peftsweep-chat``: text written by the model that a trial has trained."""
    streams.settle()

    def saved(*words: str) -> configuration.Trial:
        cfg, used = _composed(*_one_point(words, "peftsweep-chat"))
        return configuration.without_data(cfg, cfg.hydra.runtime.choices, used)

    sys.exit(_run_command(lambda: chat_with.main(chat_with.parser().parse_intermixed_args(), saved)))


def data_parser(formats: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of ``peftsweep-data`` for a dataset; ``formats`` are those that it can write."""
    parser = command_line.OneLineParser(
        prog="peftsweep-data",
        description="Write a sample of a dataset as two files, to train and to test on. "
        "peftsweep-data show ROWS prints rows as a model is trained on them.",
    )
    names = sorted(file.stem for file in (Path(fill.conf_dir()) / "dataset").glob("*.yaml"))
    parser.add_argument("dataset", metavar="NAME", choices=names, help="a dataset of peftsweep: " + " ".join(names))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="x.jsonl; tests go to x.test.jsonl")
    parser.add_argument("--samples", type=int, metavar="N", help="of both parts together (default: all rows)")
    parser.add_argument("--split", type=float, default=0.9, metavar="SHARE", help="that is trained on (default: 0.9)")
    parser.add_argument("--format", choices=formats, default="raw", help="default: raw, the source's columns")
    parser.add_argument("--path", metavar="FILE", help="instead of the hub: .json .jsonl .csv .tsv .parquet")
    parser.add_argument("--encoding", metavar="NAME", help="of that file, such as cp1252 (default: UTF-8)")
    parser.add_argument("--prompt", metavar="TEMPLATE", help="instead of the dataset's, such as '{question}'")
    parser.add_argument("--answer", metavar="TEMPLATE", help="instead of the dataset's, such as '{answer}'")
    parser.add_argument("--missing", choices=("drop", "empty"), help="what a row that lacks a value becomes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample and its parts (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    return parser
