"""Short names of a model and a data set: ``model=./folder``, ``model=ORG/NAME``, ``dataset=rows.jsonl``.

Each such word stands for words that Hydra knows: ``model=causal_lm model.name_or_path=./folder``. So a trial's identity
and its record are those of the longer command.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from omegaconf import OmegaConf

from peftsweep.command_line import parsed
from peftsweep.data import files, hub, layouts
from peftsweep.data import rows as data_rows
from peftsweep.errors import InputError, first_line, say_once
from peftsweep.schema import Task

GROUPS = {"model": "model.name_or_path", "dataset": "dataset.path"}  # and the key that a path or hub id sets
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(?::(?P<split>.+))?")
WEB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?(?P<id>[\w.-]+/[\w.-]+).*")
PLAIN_WORD = re.compile(r"[\w./+-]+", re.ASCII)  # needs no quotes in Hydra's grammar
TEMPLATES = ("dataset.prompt", "dataset.answer")
# Keys that change how the rows or the config of a name are read.
SOURCE_KEYS = ("dataset.encoding", "dataset.hub_config", "dataset.revision", "model.revision")
COLUMN_KEYS = (*TEMPLATES, "dataset.reader")  # keys that say which columns are prompt and answer
PARTS = {  # the files of a folder by their names
    "train": r"train(ing)?(\b|_).*",
    "test": r"test(\b|_).*",
    "validation": r"(valid|validation|val|dev|eval)(\b|_).*",
}
SHARD = re.compile(r"-\d{5}-of-(\d{5})")  # in the name of a part of a table, as the library datasets writes it
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.md", "LICENSE.txt")
NAMED_KEYS = ("reader", "prompt", "answer", "classes")  # of a shipped data set: how its rows are read
KINDS = {"chat": "conversations", "text": "plain text"}  # options that need no templates
MAX_LISTED = 6  # files or columns, in a message
RECOGNISED = "prompt/completion, question/answer, instruction/input/output, text, messages, conversations"

ReadingKeys = tuple[tuple[str, str], ...]  # keys of the command line that decide how rows are read, and their values


class Meaning(NamedTuple):
    """The words that a short name stands for, as keys in this order, and a remark to print."""

    keys: dict[str, Any]
    remark: str = ""


def expanded(words: Sequence[str], folders: Iterable[Path]) -> list[str]:
    """The words, with each path and hub id of a model or data set replaced by the words that it stands for.

    Swept values are checked and stay as they are; they are replaced in the words of each point. Options in ``folders``
    take precedence over paths.

    Raises:
        InputError: there is no such file or folder, or its content is not recognised.
    """
    if not any(word.startswith(tuple(f"{group}=" for group in GROUPS)) for word in words):
        return list(words)
    groups = [(word.partition("=")[0], word) for word in words]
    options, given = tuple(folders), _given_keys(words)
    found: list[str] = []
    for group, word in groups:
        one = parsed(_quote_paths(word)) if group in GROUPS else None
        if one is None or one.package is not None:  # the check of all words says why a word cannot be parsed
            found.append(word)
            continue
        whole = one.is_sweep_override() and _exists(word.partition("=")[2])  # one file with a comma in its name
        meant = {name: _path_or_hub_id(group, name, options) for name in ([] if whole else _names(one))}
        names = [typed for typed in meant.values() if typed is not None]
        if names and sum(other == group for other, _ in groups) > 1:
            raise InputError(f"{word}: {group} is given twice; give it once, with several values separated by commas")
        if names and GROUPS[group] in given:
            raise InputError(f"{word}: {GROUPS[group]} is given too and names another one; give one of the two")
        if (
            group == "dataset"
            and "dataset.hub_split" in given
            and (split := next(filter(None, map(_split, names)), ""))
        ):
            raise InputError(
                f"{word}: dataset.hub_split is given too, and the name has the split {split}; give one of the two"
            )
        longer = [_expand_name(group, name, _reading_keys(given), options) for name in names]
        if one.is_sweep_override() or not longer:
            found.append(_quote_paths(word))
        else:
            found += [override(key, value) for key, value in longer[0].keys.items() if key == group or key not in given]
        if given.get("quiet", "").lower() != "true":
            for remark in filter(None, (meaning.remark for meaning in longer)):
                say_once(remark)
    return found


def forget() -> None:
    """Forget what files and folders held, so that the next command reads them again."""
    _expand_name.cache_clear()


# ---- words -----------------------------------------------------------------------------------------


def _given_keys(words: Sequence[str]) -> dict[str, str]:
    pairs = (word.lstrip("+~").partition("=") for word in words)
    return {key: value.strip("'\"") for key, _, value in pairs}


def _reading_keys(given: Mapping[str, str]) -> ReadingKeys:
    """The keys of the command line that decide how rows are read."""
    values = {key: given[key] for key in SOURCE_KEYS if key in given}
    return tuple((values | {key: "" for key in COLUMN_KEYS if key in given}).items())


def _quote_paths(word: str) -> str:
    """The word, with quotes around each path that Hydra's grammar cannot read, such as ``~/model`` or ``a=b.csv``."""
    group, _, value = word.partition("=")
    if group not in GROUPS or parsed(word):
        return word
    names = [value] if _exists(value) else value.split(",")
    quoted = [name if parsed(f"{group}={name}") else _quoted(name) for name in names]
    again = f"{group}={','.join(quoted)}"
    looks = all(looks_like_path(name) for name in names)
    return again if looks and parsed(again) else word


def _names(one: Override) -> list[str]:
    """The texts that a word chooses, without quotes."""
    value = one._value
    choices = value.list if isinstance(value, ChoiceSweep) else [value]
    texts = [choice.text if isinstance(choice, QuotedString) else choice for choice in choices]
    return [str(text) for text in texts if isinstance(text, str | int | float) and not isinstance(text, bool)]


def override(key: str, value: Any) -> str:
    """An override in Hydra's grammar, quoted if it must be."""
    return f"{key}={_hydra_value(value)}"


def _hydra_value(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_hydra_value, value))}]"
    text = str(value)
    return text if PLAIN_WORD.fullmatch(text) and not re.fullmatch(r"[\d.e+-]+", text) else _quoted(text)


def _quoted(text: str) -> str:
    """The text in quotes; backslashes before a quote and at the end are doubled, as Hydra's grammar requires."""
    quote = "'" if '"' in text and "'" not in text else '"'
    escaped = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", text)
    ending = len(escaped) - len(escaped.rstrip("\\"))
    return f"{quote}{escaped}{escaped[len(escaped) - ending :]}{quote}"


# ---- what a name is --------------------------------------------------------------------------------


def looks_like_path(name: str) -> bool:
    """Whether a name has the form of a path, hub id or file, which no option has."""
    return "/" in name or name.startswith("~") or files.format_of(name) in files.FORMATS


def _path_or_hub_id(group: str, name: str, folders: tuple[Path, ...]) -> str | None:
    """The path or hub id that a name stands for; None if it names an option, or nothing is found."""
    if not name.strip():
        return None
    if not name.startswith((".", "/", "~")) and any(_exists(one / group / f"{name}.yaml") for one in folders):
        return None
    if looks_like_path(name) or (group == "dataset" and re.search(r"\.[A-Za-z]\w{0,7}$", name)):
        return name
    return f"./{name}" if _exists(name) else None


@functools.lru_cache(maxsize=1024)
def _expand_name(group: str, name: str, given: ReadingKeys, folders: tuple[Path, ...]) -> Meaning:
    if page := WEB.fullmatch(name):
        raise InputError(f"{group}={name}: is a web address; must be {group}={page['id']}")
    keys = dict(given)
    return _model(name, keys, folders[0]) if group == "model" else _dataset(name, keys, folders[0])


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # the name is too long, or ~user does not exist
        return False


def _is_local(name: str) -> bool:
    return _exists(name) or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name)


def _split(name: str) -> str:
    """The split at the end of a hub name (``ORG/NAME:test``); empty if there is none."""
    found = None if _is_local(name) else HUB_ID.fullmatch(name)
    return (found and found["split"]) or ""


# ---- models ----------------------------------------------------------------------------------------


def _model(name: str, given: Mapping[str, str], conf: Path) -> Meaning:
    folder = Path(name).expanduser()
    if not _is_local(name):
        described = _config_on_hub(name, given.get("model.revision"), conf)
    elif not folder.exists():
        raise InputError(f"model={name}: no such folder; one of the hub is model=ORG/NAME{files.similar(folder)}")
    elif not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file() or (folder / "adapter").is_dir()
        what = "is an adapter: adapter.path=" + name + " evaluates it" if adapter else "holds no config.json"
        beside = (folder.parent / "config.json").is_file()
        is_file = "is a file; must be the folder of a checkpoint" + (f": model={folder.parent}" if beside else "")
        raise InputError(f"model={name}: {is_file if folder.is_file() else what}")
    else:
        try:
            described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"model={name}: its config.json cannot be read ({first_line(error)})") from None
    try:
        option, task = kind(described if isinstance(described, dict) else {})
    except InputError as error:
        raise InputError(f"model={name}: {error}") from None
    return Meaning({"model": option, GROUPS["model"]: name} | ({} if task is None else {"model.task": task.value}))


def _config_on_hub(name: str, revision: str | None, conf: Path) -> Any:
    """The config.json of a model on the hub; for our presets only its architecture; {} if the hub does not answer.

    Raises:
        InputError: the hub answers, but not with a config.json.
    """
    for file in sorted((conf / "model").glob("*.yaml")):
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        if (node.get("model") or node).get("name_or_path") == name:
            return {"architectures": ["ForMaskedLM" if "model" in node else "ForCausalLM"]}
    try:
        with hub.loading(f"model={name}", "a local folder"):
            return json.loads(hub.config_of_model(name, revision).read_text(encoding="utf-8"))
    except InputError:
        if hub.problem() is None:
            raise
        return {}  # not cached and no network: loading raises the error


def kind(config: Mapping[str, Any]) -> tuple[str, Task | None]:
    """The option of ``model`` for a checkpoint's config.json, and its task if that is not the option's default.

    A model that generates text is ``causal_lm``, also if it reads images too; a decoder with a classifier's head is
    ``causal_lm`` with the task ``seq_cls``; any other model that reads text is an ``encoder``.

    Raises:
        InputError: a model of this type does not read text.
    """
    made = " ".join(map(str, config.get("architectures") or ()))
    if re.search(r"ForCausalLM|LMHeadModel|ForConditionalGeneration", made):
        return "causal_lm", None
    if re.search(r"ForMaskedLM|ForPreTraining", made):
        return "encoder", None
    model_type = str(config.get("model_type", ""))
    if not _decodes(model_type):
        if not _reads_text(model_type):
            raise InputError(f"model_type {model_type} reads no text; must be a language model or an encoder of text")
        return "encoder", None
    return "causal_lm", Task.seq_cls if "ForSequenceClassification" in made else None


def _decodes(model_type: str) -> bool:
    """Whether transformers' models of this type are decoders that generate text, and not encoders."""
    from transformers.models.auto import modeling_auto as names  # slow to import, and most names do not need it

    writes = model_type in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return not model_type or (writes and model_type not in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def _reads_text(model_type: str) -> bool:
    """Whether transformers has a text classifier of this type, or does not know the type."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as names

    return model_type not in CONFIG_MAPPING or model_type in names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


# ---- data sets -------------------------------------------------------------------------------------


def _dataset(name: str, given: Mapping[str, str], conf: Path) -> Meaning:
    path = Path(name).expanduser()
    if not _is_local(name) and files.format_of(name) not in files.FORMATS:
        return _hub_dataset(name, given, conf)
    own = folder_files(name, path) if path.is_dir() else {"dataset.path": str(path)}
    file = own["dataset.path"]
    if not files.matching(file):
        one_of_hub = "" if "." in Path(name).name[1:] else "; one of the hub is dataset=ORG/NAME:SPLIT"
        raise InputError(f"dataset={name}: {files.no_file(Path(file), one_of_hub)}")
    if files.format_of(file) not in files.FORMATS:
        raise InputError(f"dataset={name}: unknown format; must be a file of {' '.join(files.FORMATS)}, or .gz of them")
    if files.format_of(file) in files.PLAIN:
        return Meaning({"dataset": "text"} | own)
    if "dataset.reader" in given or all(key in given for key in TEMPLATES):
        return Meaning({"dataset": "file"} | own)
    return _recognised(name, files.first_rows(file, "dataset.path", given.get("dataset.encoding")), own, given, conf)


def folder_files(name: str, folder: Path) -> dict[str, str]:
    """The training and test file of a folder, by key: chosen by their names, or its only file.

    Shards of one table, as repositories on the hub have them, are one file: ``train-*-of-00002.parquet``. ``name`` is
    the folder as given, for messages.

    Raises:
        InputError: it holds no such file, several whose names do not show their part, or not all shards.
    """
    data = _whole_tables(name, _data_files(folder) or _data_files(folder / "data"))  # as repositories on the hub
    parts = {part: [one for one in data if re.fullmatch(names, one.stem, re.I)] for part, names in PARTS.items()}
    if len(data) == 1:
        return {"dataset.path": str(data[0])}
    if len(parts["train"]) == 1 and max(map(len, parts.values())) == 1 and sum(map(len, parts.values())) == len(data):
        tests = parts["test"] or parts["validation"]
        return {"dataset.path": str(parts["train"][0]), "dataset.test_path": str(tests[0])}
    if not data and list(folder.glob("**/*.arrow")):
        write = shlex.quote(f"import datasets; datasets.load_from_disk({name!r}).to_parquet('rows.parquet')")
        raise InputError(f"dataset={name}: was written by save_to_disk; convert it to a file: python -c {write}")
    if not data:
        raise InputError(f"dataset={name}: no file in this folder can be read; must be {' '.join(files.FORMATS)}")
    listed = ", ".join(file.name for file in data[:MAX_LISTED]) + (", ..." if len(data) > MAX_LISTED else "")
    example = f"dataset={(parts['train'] or data)[0]}"
    example += f" dataset.test_path={parts['test'][0]}" if parts["test"] else ""
    raise InputError(f"dataset={name}: holds several files ({listed}); name the one to train on: {example}")


def _whole_tables(name: str, found: Sequence[Path]) -> list[Path]:
    """The files, with a pattern in place of all shards of a table.

    Raises:
        InputError: shards are missing.
    """
    tables = dict[Path, list[Path]]()
    for file in found:
        tables.setdefault(file.with_name(SHARD.sub(r"-*-of-\1", file.name)), []).append(file)
    for table, shards in tables.items():
        count = SHARD.search(shards[0].name)
        if count is not None and len(shards) != int(count[1]):
            raise InputError(
                f"dataset={name}: holds {len(shards)} of the {int(count[1])} files {table.name}; copy the others, "
                f"or name those to train on: dataset={table}"
            )
    return [shards[0] if len(shards) == 1 else table for table, shards in tables.items()]


def _data_files(folder: Path) -> list[Path]:
    """The files of rows in a folder; files of text only if there are no others, as they mostly are notes."""
    found = sorted(one for one in folder.glob("*") if one.is_file() and files.format_of(one) in files.FORMATS)
    found = [one for one in found if one.name not in NO_ROWS]
    return [one for one in found if files.format_of(one) not in files.PLAIN] or found


def _hub_dataset(name: str, given: Mapping[str, str], conf: Path) -> Meaning:
    found = HUB_ID.fullmatch(name)
    assert found is not None
    source, split = found["id"], found["split"]
    for file in sorted((conf / "dataset").glob("*.yaml")):
        own = yaml.safe_load(file.read_text(encoding="utf-8"))["dataset"]
        same_split = split in (None, own.get("hub_split", "train"))
        same_config = given.get("dataset.hub_config") in (None, own.get("hub_config"))
        if own.get("hub") == source and same_split and same_config:
            return Meaning({"dataset": file.stem})
    where: dict[str, Any] = {"dataset.path": None, "dataset.hub": source, "dataset.hub_split": split or "train"}
    if "dataset.reader" in given or all(key in given for key in TEMPLATES):
        return Meaning({"dataset": "file"} | where)
    config, revision = given.get("dataset.hub_config"), given.get("dataset.revision")
    rows = data_rows.first_hub_rows(source, config, split or "train", revision)
    return _recognised(name, rows, where, given, conf)


def _prompt(template: str | None) -> str:
    """A template as text for a message; if it depends on the model's task, one text for each task."""
    by_task = {
        task: str(OmegaConf.create({"model": {"task": task.value}, "prompt": template})["prompt"]) for task in Task
    }
    shown = f"'{by_task[Task.causal_lm]}'"
    of_classifier = by_task[Task.seq_cls]
    return shown if of_classifier == by_task[Task.causal_lm] else f"{shown} (of a classifier '{of_classifier}')"


def _recognised(
    name: str, rows: Sequence[files.Row], where: Mapping[str, Any], given: Mapping[str, str], conf: Path
) -> Meaning:
    """The option and keys for ``rows`` by their columns; ``where`` are the keys that name their source."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    listed = ", ".join(columns[:MAX_LISTED]) + (", ..." if len(columns) > MAX_LISTED else "")
    layout = None if any(key in given for key in TEMPLATES) else layouts.recognise(rows)
    if layout is None:
        shown = {f"dataset.{key}": value for key, value in layouts.example(rows).items()}
        both = "dataset.prompt" in shown
        first = {"dataset": name} if both else {"dataset": "text", **where}
        words = [shlex.quote(override(key, value)) for key, value in first.items()]
        words += [f"'{override(key, value)}'" for key, value in shown.items()]
        why = f"do not show which is the prompt and which the answer (recognised are {RECOGNISED})"
        if uneven := layouts.not_text(rows):
            why += f", as not all values of {uneven} are texts or numbers"
        if unwanted := layouts.unwanted(rows):
            why += f" and rows whose {unwanted} is false hold rejected answers; remove these rows from the file"
        if templates := [key for key in TEMPLATES if key in given]:
            why = f"are not used where {templates[0]} is given"
        raise InputError(
            f"dataset={name}: its columns ({listed}) {why}; give {'both' if both else 'it'}, such as: {' '.join(words)}"
        )
    keys, evaluations = dict(layout.keys), []
    if layout.named is not None:
        node = yaml.safe_load((conf / "dataset" / f"{layout.named}.yaml").read_text(encoding="utf-8"))
        keys = {key: node["dataset"][key] for key in NAMED_KEYS if key in node["dataset"]}
        keys |= {key: keys[key].replace("\n", "\\n") for key in ("prompt", "answer")}
        evaluations = next(one["override /eval"] for one in node["defaults"] if "override /eval" in one)
    longer = {"dataset": layout.option, **where, **{f"dataset.{key}": value for key, value in keys.items()}}
    remark = f"dataset={name}: columns {listed}: " + KINDS.get(
        layout.option, f"dataset.prompt={_prompt(keys.get('prompt'))} dataset.answer='{keys.get('answer')}'"
    )
    if evaluations not in ([], ["perplexity"]):
        remark += f"; dataset={layout.named} dataset.path=FILE is evaluated by {', '.join(evaluations)} as well"
    return Meaning(longer, remark)
