"""Connect sweep=tune and sweep=league to Hydra: words of the command, composed trials, launcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf

from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.study import store
from peftsweep.sweep.points import Points
from peftsweep.tuning import answer, replay
from peftsweep.tuning.answer import TuningCommand
from peftsweep.tuning.space import SEARCHED, base_words

METHOD, SWEEP = "method", "sweep"
RATE = "train.learning_rate"


def run(launcher: Any, config: DictConfig, loader: Any, points: Sequence[Sequence[str]], *, league: bool) -> None:
    """Run the search of a command; ``points`` holds the words of the command line once for each method.

    Raises:
        InputError: a key does not fit such a search; nothing was trained.
    """
    if config.tune.replay is not None and not league:
        for line in replay.lines([replay.run(grid) for grid in replay.read(Path(config.tune.replay).expanduser())]):
            print(line)
        return
    if league and (key := next((key for key in ("budget", "tune.replay") if OmegaConf.select(config, key)), None)):
        raise InputError(f"{key}: is of sweep=tune; a league's budget is league.trials and league.seeds of each method")
    if (sweeper := config.hydra.runtime.choices["hydra/sweeper"]) != "grid":
        raise InputError(f"hydra/sweeper={sweeper}: sweep={'league' if league else 'tune'} brings its own")
    command = _parse(launcher, config, loader, points, league)
    answer.prepare(command, store.LEAGUE if league else store.TUNE)  # raises before anything is printed
    if not config.quiet:
        print(_study_line(command.folder, league), flush=True)
    if config.dry_run:
        _dry_run(command, launcher, league)
        return
    lines: list[str] = []
    (answer.league if league else answer.tune)(command, lines.append)
    for line in (
        [line for line in lines if line.startswith(("Use ", "No gain shown by ", "By "))] if config.quiet else lines
    ):
        print(line, flush=True)


def _study_line(folder: Path, league: bool) -> str:
    """The first line of a search, which names its study."""
    name, file = ("league", store.LEAGUE) if league else ("tune", store.TUNE)
    action = "goes on with" if (folder / file).is_file() else "keeps its trials in"
    return f"sweep={name}: {action} the study {folder} (study=NAME: another)"


def _parse(
    launcher: Any, config: DictConfig, loader: Any, points: Sequence[Sequence[str]], league: bool
) -> TuningCommand:
    words = [[word for word in point if not word.startswith(f"{SWEEP}=")] for point in points]
    if league and (placebo := f"{METHOD}={config.league.placebo}") and not any(placebo in point for point in words):
        words = [[*(word for word in words[0] if not word.startswith(f"{METHOD}=")), placebo], *words]
    trials = {str(trial.choices[METHOD]): trial for trial in _trials(launcher, words)}
    if len(trials) < len(words):
        raise InputError("method: give each method once; a method that is read from a file cannot be searched")
    keys = {word.partition("=")[0] for word in words[0]}
    with_rate = {name: RATE in keys or _names_rate(loader, name) for name in trials}

    def launch(batch: list[list[str]]) -> list[Any]:
        jobs = launcher.launch(batch, initial_job_idx=0)
        return [job._return_value if job.status in (JobStatus.COMPLETED, JobStatus.FAILED) else None for job in jobs]

    return TuningCommand(
        words=store.with_own_options(config.hydra.overrides.task),
        base_words=base_words(words[0]),
        trials=trials,
        with_rate=with_rate,
        launch=launch,
        folder=store.folder(config.study),
        at_once=_at_once(launcher, config, words),
    )


def _trials(launcher: Any, words: Sequence[Sequence[str]]) -> list[Trial]:
    points = Points(launcher.context.config_loader, launcher.config)
    return [points.trial(own) for own in launcher.spelled_out(words)]


def _at_once(launcher: Any, config: DictConfig, points: Sequence[Sequence[str]]) -> int:
    """The trials that run side by side, for predictions of wall time; on launchers other than the local one, all."""
    is_local = str(config.hydra.launcher._target_).endswith(".LocalLauncher")
    return int(launcher.at_once(points)) if is_local else 10**6


def _names_rate(loader: Any, option: str) -> bool:
    """Whether the yaml of a method, or one that it builds on, names a learning rate."""
    found = loader.repository.load_config(f"{METHOD}/{option}")
    if found is None:
        return False
    if OmegaConf.select(found.config, RATE) is not None:
        return True
    others = [entry.get_name() for entry in found.defaults_list or [] if hasattr(entry, "get_name")]
    own = [name for name in others if name and name not in ("_self_", option) and "/" not in name]
    return any(_names_rate(loader, name) for name in own)


def check_axes(parsed: Sequence[Override], name: str) -> None:
    """Check that only ``method`` has several values.

    Raises:
        InputError: another key has; the message names it, and the key that lists the values to search.
    """
    for word in parsed:
        if word.is_sweep_override() and word.key_or_group != METHOD:
            key = word.key_or_group
            way = f"; give {SEARCHED[key]}" if key in SEARCHED else ""
            raise InputError(f"{word.input_line}: sweep={name} takes several values of method alone{way}")


def _dry_run(command: TuningCommand, launcher: Any, league: bool) -> None:
    """List the first trials, and the values that the search may try after them."""
    setting = answer.prepare(command, store.LEAGUE if league else store.TUNE)
    first = answer.first_trials(setting, command.any.config.seed)
    launcher.launch([setting.trials.words_of(point, until) for point, until in first], initial_job_idx=0)
    for line in answer.planned_lines(setting):
        print(line)
