"""Find the trials that a study contains already, and decide whether they are run again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_omega_conf_dumper

from peftsweep.config.compose import Trial
from peftsweep.forecast import forecast
from peftsweep.study import record, rungs, store, sweep_record
from peftsweep.study.atomic import make_way
from peftsweep.study.reading import Unreadable, read_text, read_yaml
from peftsweep.study.record import Result, Status
from peftsweep.study.trust import as_text
from peftsweep.trial.faults import faults

FORCED = ".forced"  # in a trial's folder: the token of the last command with force=true that began the trial


def anew(trial: Trial) -> bool:
    """Whether force=true applies: what the study holds of the trial is from before this command.

    A job that is requeued and a trial whose worker has died are further attempts of one command. They go on from the
    checkpoint of the attempt before, or a training longer than the time limit of a job would never end.
    """
    if not trial.config.force:
        return False
    try:
        return not (token := sweep_record.command_token()) or read_text(folder(trial) / FORCED) != token
    except Unreadable:
        return True


def mark_forced(place: Path) -> None:
    """Note that from now on the trial's folder ``place`` holds what this command has made."""
    record.write_text(place / FORCED, sweep_record.command_token())


def folder(trial: Trial) -> Path:
    """The folder of the trial's record, existing or new; a record of an earlier version stays where it is."""
    root = store.folder(trial.config.study)
    place = store.trial_folder(root, trial.slug, trial.identity)
    if place.exists():
        return place
    if (before := store.recognised(root, trial.identity)) is not None:
        return before
    if trial.earlier is not None:
        before = store.trial_folder(root, trial.slug, trial.earlier.trial)
        held = store.result(before) if before.exists() else None
        if held is not None and _recognised(trial, held, "identity", trial.earlier.trial):
            return before
    return place


def _recognised(trial: Trial, held: Result, key: str, earlier: str) -> bool:
    """Whether a record is that of the trial (``key`` is "identity"), or of the same training ("training").

    The current rule of identity decides. By an earlier rule several trials may have the same identity: a record with
    such an identity counts only if no other trial has been recognised in it.
    """
    mine, taken = getattr(trial, key), held.run_info.get("recognised") or {}
    return mine in (held.run_info.get(key), taken.get(key)) or (
        faults.rule_of(held) == 1 and held.run_info.get(key) == earlier and not taken
    )


def outdated(trial: Trial) -> str | None:
    """Why the numbers of the trial's record, which an earlier version wrote, are wrong; None if they are not."""
    held = None if anew(trial) else store.result(folder(trial))
    return None if held is None else _fault(held)


def _fault(held: Result) -> str | None:
    return faults.outdated(held) if held.status in rungs.TRAINED_STATUSES else None


def damaged(trial: Trial) -> str | None:
    """The damage of the trial's files, because of which it is run again; None if there is no damage."""
    return None if anew(trial) else store.damage(folder(trial))


def trained(trial: Trial) -> Result | None:
    """A trial of the study with the same training, whose adapter can be taken instead of training again."""
    root, earlier = store.folder(trial.config.study), trial.earlier
    for training in (trial.training, *([earlier.training] if earlier else [])):
        held = None if trial.config.force else store.trained(root, training)
        if held and not faults.outdated(held, training=True) and _recognised(trial, held, "training", training):
            return held
    return None


def finished(trial: Trial) -> Result | None:
    """The trial's record, if nothing is left to do for it; this trial's label is then added to it.

    A trial that was refused by a smaller memory limit is run again under a limit that it fits. A trial that was stopped
    at a rung goes on to a later rung, or to its end.
    """
    done = done_before(trial)
    if done is None or lacks_profile(trial, done) or lacks_answers_of_base(trial, done):
        return None
    if done.error and done.error["type"] == Oversized.__name__ and not forecast.oversized(trial, own_order=True):
        return None
    new_label = trial.label not in done.run_info["labels"]
    by_earlier_rule = done.run_info.get("identity") != trial.identity and not done.run_info.get("recognised")
    if new_label:
        done.run_info["labels"].append(trial.label)
    if by_earlier_rule:
        done.run_info["recognised"] = {"identity": trial.identity, "training": trial.training}
    if new_label or by_earlier_rule or _update_headlines(trial, done):
        done.write(folder(trial))
    if by_earlier_rule:
        store.mark_recognised(done)
    _repair_hydra_files(trial, folder(trial))
    return done


def _update_headlines(trial: Trial, done: Result) -> bool:
    """Set the record's headline metrics to those of the configuration; returns whether any has changed."""
    changed = False
    for name, node in trial.config.eval.items():
        wanted, found = node.get(record.HEADLINE), done.eval_info.get(name, {})
        if wanted in found and found.get(record.HEADLINE) != wanted:
            found[record.HEADLINE], changed = wanted, True
    return changed


def resumes_full(trial: Trial) -> bool:
    """Whether the trial was stopped at a rung of a halving, and this command has no halving."""
    held = store.result(folder(trial)) if rungs.begins(trial.config.halving) is None else None
    return held is not None and held.status is Status.stopped


class Before:
    """The records of trials before a process runs them, to tell which records it has written."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._versions = {one.identity: store.version(folder(one)) for one in trials}

    def record(self, trial: Trial, *, new: bool) -> Result | None:
        """The trial's record; with ``new`` None if it was there before, such as that of an earlier attempt."""
        place = folder(trial)
        return None if new and store.version(place) == self._versions[trial.identity] else store.result(place)


def done_before(trial: Trial) -> Result | None:
    """The result of this trial from an earlier run, if it is still valid."""
    done = None if anew(trial) else store.result(folder(trial))
    if done is None or not done.status.done or _fault(done) or damaged(trial):
        return None
    return done if _is_far_enough(trial, done) else None


def _is_far_enough(trial: Trial, done: Result) -> bool:
    """Whether the trial has reached the rung or end of this command, which may be later than where it was stopped."""
    stop = done.run_info.get("stopped")
    if stop is None or done.status is not Status.stopped:
        return rungs.reached(trial.config.halving, done)
    if stop["why"] == rungs.PRUNED:
        return trial.pruning is not None
    patience, waited = trial.config.train.patience, done.config["train"].get("patience")
    return patience is not None and waited is not None and waited >= patience


def lacks_profile(trial: Trial, done: Result) -> bool:
    """Whether the configuration has a profiler whose profile the earlier run did not write."""
    wanted = bool(trial.config.profiler) and done.status is Status.success
    return wanted and trial.choices["profiler"] not in done.train_info.get("profile", {})


def lacks_answers_of_base(trial: Trial, done: Result) -> bool:
    """Whether a file of the untouched base's answers, which the record names, is damaged."""
    root = store.folder(trial.config.study)
    named = {name: str(found.get("base_predictions") or "") for name, found in done.eval_info.items()}
    files = {name: root / file for name, file in named.items() if store.is_below(file, store.BASE)}
    return done.status is Status.success and any(store.damage_of_lines(files[name], done, name) for name in files)


class Refused(Exception):
    """The combination of method, quantisation and model is known not to work."""


class Oversized(Refused):
    """The trial is predicted not to fit into the memory."""


def hydra_files(trial: Trial) -> dict[str, str]:
    """The files that Hydra would write: the composed configuration and the words of the command line."""
    return {
        ".hydra/config.yaml": _as_yaml(as_text(trial.tree)),
        ".hydra/overrides.yaml": _as_yaml(store.with_own_options(trial.overrides)),
    }


def _as_yaml(plain: Any) -> str:
    """The text that ``OmegaConf.to_yaml`` makes of plain values, without a container of OmegaConf made of them."""
    own = get_omega_conf_dumper()  # quotes texts that look like numbers
    return str(yaml.dump(plain, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=own))


def _repair_hydra_files(trial: Trial, place: Path) -> None:
    """Write each file of ``hydra_files`` again that exists and is damaged."""
    for name, shape in ((".hydra/config.yaml", dict), (".hydra/overrides.yaml", [str])):
        try:
            if os.path.lexists(place / name):
                read_yaml(place / name, shape)
        except Unreadable:
            make_way(place / name)
            record.write_text(place / name, hydra_files(trial)[name])
