"""What trials and configurations are called: by the settings in which they differ, and by no others.

One rule for all that a person reads: the lines of a running sweep, the dry run, tables, plots and reports. It works on
columns of text, a value a trial (empty: the trial has no such setting), so that a sweep of configurations and a table
of records that were read back are named alike.
"""

from __future__ import annotations

import itertools
import json
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftsweep.study import record

Texts = Mapping[str, Sequence[str]]  # a setting -> its value in each trial, as text

LABEL, METHOD, QUANT, SEED = "config.label", "choices.method", "choices.quant", "config.seed"
RANK = "config.method.r"
SETTINGS = ("choices.", "config.")
# What changes no number of a trial, or is no choice of a person.
NO_SETTINGS = (
    *("choices.profiler", "choices.tracker", "choices.inference", "choices.sweep", "choices.point"),
    *(SEED, LABEL, "config.study", "config.experiments", "config.device", "config.dry_run"),
    *("config.memory_limit", "config.skip_oversized", "config.force", "config.quiet", "config.stop_on_failure"),
    *("config.halving.", "config.objective", "config.repeat"),
    *("config.profiler.", "config.tracker.", "config.train.checkpoint_every", "config.train.log_every"),
    "config.train.patience",
    *(
        "config.train.params_file",
        "config.adapter.save",
        "config.adapter.check",
        "config.adapter.merge",
        "config.adapter.scales",
    ),
)
OF_SOME = ("config.eval.", "config.inference.")  # settings that a trial may lack and yet be the same training
# Of settings that move together, the one that a person would name.
PREFERRED = (
    RANK,
    *(f"config.{name}" for name in ("train.learning_rate", "model.name_or_path", "dataset.path", "dataset.prompt")),
    *(f"config.train.{name}" for name in ("steps", "epochs", "batch_size")),
)
SHORT = {"learning_rate": "lr", "target_modules": "modules", "otherwise": "modules", "name_or_path": "model"}
FRACTION = re.compile(r"-?\d+\.\d+(e-?\d+)?|-?\d+e-\d+")  # a number, as text
FIRST = (LABEL, METHOD)  # in names
# In which no two trials of one study differ for their numbers' sake.
NOT_IN_NAMES = tuple(
    f"config.{name}" for name in ("study", "dry_run", "force", "quiet", "stop_on_failure", "experiments")
)
LONGEST_VALUE = 32  # characters of one setting's value in a name


def is_setting(key: str, texts: Iterable[str]) -> bool:
    """Whether ``key`` is part of what makes a configuration, given its values in all trials.

    A trial with one evaluation more is the same configuration, unless two disagree on a setting that they share.
    """
    if not key.startswith(SETTINGS) or key.startswith(NO_SETTINGS):
        return False
    return not key.startswith(OF_SOME) or len({text for text in texts if text}) > 1


def telling(columns: Texts) -> list[str]:
    """The settings that tell the trials apart: choices first, then rank, then those that follow from no others.

    A setting follows from others where it is a function of the choices among them, or of these and one setting more.
    """
    varied = {key: texts for key, texts in columns.items() if len(set(texts)) > 1}
    first = sorted((key for key in varied if key in FIRST or key.startswith("choices.")), key=_place_of_choice)
    found: list[str] = []
    for n, key in enumerate(first):
        if not n or not _function(varied[key], [varied[other] for other in first[:n]]):
            found.append(key)
    chosen = [varied[key] for key in found]
    rest: list[str] = []
    for key in sorted(set(varied) - set(first), key=lambda key: _place_of_setting(key, varied[key])):
        known = [chosen] * bool(chosen) + [[*chosen, varied[other]] for other in rest]
        if not any(_function(varied[key], others) for others in known):
            rest.append(key)
    return [*found, *rest]


def _place_of_choice(key: str) -> tuple[int, str]:
    return FIRST.index(key) if key in FIRST else len(FIRST), key


def _place_of_setting(key: str, texts: Sequence[str]) -> tuple[bool, bool, int, int, str]:
    place = PREFERRED.index(key) if key in PREFERRED else len(PREFERRED)
    return not key.startswith(SETTINGS) or key == SEED, key != RANK, len(set(texts)), place, key


def _function(texts: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether equal values of all ``others`` always come with equal ``texts``."""
    seen: dict[tuple[str, ...], str] = {}
    known = zip(*others, strict=True)
    return all(seen.setdefault(values, text) == text for values, text in zip(known, texts, strict=True))


class Names:
    """What the settings, their values and the trials of ``columns`` are called."""

    def __init__(self, columns: Texts) -> None:
        self._columns = columns
        self.settings = telling(columns)  # that tell the trials apart
        self._short: dict[str, dict[str, str]] = {}

    def trials(self) -> list[str]:
        """The name of each trial; those that differ in a setting of ``columns`` have different ones."""
        labels = self._columns.get(LABEL, ())
        if len({bool(label) for label in labels}) > 1:  # some were given one, the others are told apart without
            return self._apart([bool(label) for label in labels])
        keys = self.settings
        if not keys and any(labels):
            keys = [LABEL]
        elif METHOD in self._columns and not {METHOD, LABEL} & set(keys):
            keys = [METHOD, *keys]
        if not keys:
            return ["default"] * max(map(len, self._columns.values()), default=0)
        rows = list(zip(*(self._columns[key] for key in keys), strict=True))
        named = {row: ", ".join(filter(None, map(self.setting, keys, row))) or "default" for row in rows}
        named = dict(zip(named, numbered(list(named.values())), strict=True))
        return [named[row] for row in rows]

    def _apart(self, labelled: Sequence[bool]) -> list[str]:
        """The names of trials with a label among themselves, and those of trials without."""
        found = [""] * len(labelled)
        for kind in (True, False):
            places = [n for n, has in enumerate(labelled) if has == kind]
            mine = {key: [texts[n] for n in places] for key, texts in self._columns.items()}
            for place, name in zip(places, Names(mine).trials(), strict=True):
                found[place] = name
        distinct = dict.fromkeys(zip(labelled, found, strict=True))
        named = dict(zip(distinct, numbered([name for _, name in distinct]), strict=True))
        return [named[one] for one in zip(labelled, found, strict=True)]

    def setting(self, key: str, value: Any) -> str:
        """A setting with its value: ``lr=0.001``, ``4bit``; empty where there is none."""
        text = self.value(key, value)
        if not text or key == LABEL:
            return text
        if key == QUANT and text == "none":
            return "unquantised"
        if key.startswith("choices."):
            return f"{self.key(key)} {text}" if text in ("default", "none") else text
        return f"{self.key(key)}={text}"

    def value(self, key: str, value: Any) -> str:
        """A value without its setting: no longer than it needs to be to tell it from the setting's other ones."""
        text = as_text(value)
        if key not in self._short:
            self._short[key] = short_forms(self._columns.get(key, ()))
        return self._short[key].get(text, plain(text))

    def key(self, key: str) -> str:
        """The last word of a setting's name, or its last two where another one that varies ends like it.

        What an evaluation is told is no setting without its name.
        """
        if key.startswith("config.eval."):
            return key.removeprefix("config.")
        parent, _, last = key.rpartition(".")
        twins = [other for other in self.settings if other.rpartition(".")[2] == last and other != key]
        last = SHORT.get(last, last)
        return f"{parent.rpartition('.')[2]}.{last}" if twins else last


# ---- values ----------------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """A value as a table of records keeps it; empty for none. What is given as text stays as it is."""
    if isinstance(value, str):
        return value
    if value is None or type(value).__name__ == "NAType" or value != value:
        return ""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)


def plain(text: str) -> str:
    """A number in the digits that it was given in, a list as its entries."""
    if FRACTION.fullmatch(text):
        return f"{float(text):g}"
    if text in ("True", "False"):
        return text.lower()
    if text.startswith("[") and text.endswith("]"):
        try:
            return "+".join(map(str, json.loads(text)))  # lists are kept as JSON
        except ValueError:
            pass
    line = text.replace("\n", "\\n").replace("`", "'")
    return f'"{line}"' if line != line.strip() else line


def short_forms(texts: Iterable[str]) -> dict[str, str]:
    """A short form of each of the values of one setting, no two alike: what they have in common is left out.

    Of paths and dotted names the last parts are kept, as many as tell them apart; of long texts the part that differs.
    """
    values = list(dict.fromkeys(filter(None, texts)))
    short = [plain(text) for text in values]
    if len(set(short)) < len(short):  # numbers that differ beyond the digits shown
        short = values
    for mark in ("/", "."):
        names = [text for text in values if mark in text and not FRACTION.fullmatch(text)]
        if names and not any(re.search(r"[\s{]", text) for text in values):
            short = _ends(short, mark)
    return dict(zip(values, distinct(short, LONGEST_VALUE), strict=True))


def _ends(texts: Sequence[str], mark: str) -> list[str]:
    """The last parts of paths, or of dotted names of Python, as many as tell them apart."""
    if mark == "." and not all(re.fullmatch(r"[A-Za-z_][\w.]*", text) for text in texts):
        return list(texts)  # a file's ending
    parts = [text.rstrip(mark).split(mark) for text in texts]
    for count in range(1, max(map(len, parts)) + 1):
        ends = [mark.join(of_one[-count:]) for of_one in parts]
        if len(set(ends)) == len(set(texts)):
            return ends
    return list(texts)


def distinct(texts: Sequence[str], longest: int) -> list[str]:
    """Different texts in at most about ``longest`` characters each, no two alike.

    Long ones lose their middle; where that leaves some alike, they lose what these begin with instead.
    """
    owners: dict[str, list[str]] = {}
    for text in texts:
        owners.setdefault(shortened(text, longest), []).append(text)
    short: dict[str, str] = {}
    for cut, same in owners.items():
        common = max(0, len(os.path.commonprefix(same)) - 6)  # noqa: RUF071  of characters, not of folders
        for text in same:
            short[text] = shortened(f"…{text[common:]}", longest) if len(same) > 1 and common else cut
    return numbered([short[text] for text in texts])


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number where two are the same: ``a``, ``b``, ``a #2``."""
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        tries = (name if n == 1 else f"{name} #{n}" for n in itertools.count(1))
        found.append(next(one for one in tries if one not in taken))
        taken.add(found[-1])
    return found


def shortened(text: str, longest: int) -> str:
    """``text`` with its middle left out where it is long."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"


# ---- trials that were composed and records ---------------------------------------------------------


def trial_names(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each trial: ``trees`` hold their ``choices`` and ``config``, as in a record.

    Trials that differ in nothing that makes a configuration or its seed are told apart by what else they differ in.
    """
    flat = [record.flat({key: tree[key] for key in ("choices", "config")}) for tree in trees]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return trial_names_from_columns({key: [as_text(row.get(key)) for row in flat] for key in keys})


def trial_names_from_columns(columns: Texts) -> list[str]:
    """The same for columns of text."""
    return full_names(columns).trials()


def full_names(columns: Texts) -> Names:
    """The names of trials, whose seeds and, where nothing else tells them apart, other settings are part of them."""
    mine = {k: texts for k, texts in columns.items() if k in (SEED, LABEL, METHOD) or is_setting(k, texts)}
    found = Names(mine)
    varied = {k: texts for k, texts in columns.items() if k.startswith(SETTINGS) and len(set(texts)) > 1}
    others = {k: texts for k, texts in varied.items() if k not in mine and k not in NOT_IN_NAMES}
    if others and len(set(zip(*varied.values(), strict=True))) > len(set(found.trials())):
        return Names(mine | others)
    return found
