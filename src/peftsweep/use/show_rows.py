"""``peftsweep-data show``: rows as the model is trained on them, with the part that the loss is on marked."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsweep import shorthand
from peftsweep.command_line import OneLineParser, check_key_values, whole_number
from peftsweep.data import rows as data_rows
from peftsweep.data import templates
from peftsweep.schema import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftsweep.config.compose import Trial
    from peftsweep.data.templates import Example
    from peftsweep.data.tokens import Tokens

OPEN, CLOSE = "[[", "]]"
GREEN, RESET = "\x1b[32m", "\x1b[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that a terminal obeys; not tab and line feed
Piece = tuple[str, bool]  # a text, and whether it is trained on


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = OneLineParser(
        prog="peftsweep-data show",
        description="Print rows as the model is trained on them, with what the loss is on [[in brackets]], or green.",
    )
    made.add_argument("data", metavar="ROWS", help="as dataset= takes it: a file of rows, a name or a hub id")
    made.add_argument(
        "words", nargs="*", default=[], metavar="KEY=VALUE", help="of a training, such as dataset.turns=last"
    )
    made.add_argument("--model", default="tiny", metavar="DIR", help="as model= takes it (default: tiny)")
    made.add_argument("--rows", type=whole_number(1), default=3, metavar="N", help="the first N rows (default: 3)")
    made.add_argument("--tokens", action="store_true", help="also each token: place, 1 if trained on, id, text")
    return made


def main(options: argparse.Namespace, compose: Callable[..., Trial]) -> int:
    """Print the rows that the words of the command line name; ``compose`` makes a checked trial of such words.

    Raises:
        InputError: an option is wrong, or a row cannot be read or rendered; the line names the row.
    """
    trial = compose(*overrides(options))
    from peftsweep.config import build  # imports torch, which --help must not

    tokenizer = build.load_tokenizer(trial)
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, row in shown(trial, tokenizer, options.rows):
        print(f"---- row {number}: {_summary(trial, row)}")
        if row is None:
            continue
        mask = trained(row)
        print(marked(pieces(tokenizer, row.ids, mask), in_colour=in_colour))
        if options.tokens:
            names = tokenizer.convert_ids_to_tokens(row.ids)
            for place, (token, learned, name) in enumerate(zip(row.ids, mask, names, strict=True)):
                print(f"{place:5} {int(learned)} {token:7} {name!r}")
    return 0


def overrides(options: argparse.Namespace) -> list[str]:
    """The words of ``peftsweep`` for these options.

    Of a file, or of that of a folder, all rows are trained on and tested on, so that one row is enough and none is left
    out.
    """
    check_key_values(options.words)
    words = [shorthand.override("dataset", options.data), shorthand.override("model", options.model), *options.words]
    path = Path(options.data).expanduser()
    if path.exists():
        file = shorthand.folder_files(options.data, path)["dataset.path"] if path.is_dir() else str(path)
        own = {"dataset.test_path": file, "dataset.leave_out_tested": "false"}
        given = {word.lstrip("+").partition("=")[0] for word in words}
        words += [shorthand.override(key, value) for key, value in own.items() if key not in given]
    return words


def shown(trial: Trial, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[tuple[int, Tokens | None]]:
    """The first ``count`` rows in tokens by their numbers; None for one that lacks a value and is left out.

    Rows of a file or of the hub keep their order, those of a generator come in the order of training.

    Raises:
        InputError: a row cannot be read, or the chat template refuses it.
    """
    from peftsweep.config import build, evaluations

    own = trial.config.dataset
    if own.path is not None:
        rows = data_rows.read_rows(own.path, "dataset.path", own.encoding)
    elif own.hub is not None and own.generator is None:
        rows = data_rows.hub_rows(own.hub, own.hub_config, own.hub_split, own.revision, "dataset.hub")
    else:
        rows = (trial.rows or data_rows.load_rows(own)).train
    file = own.path or own.hub or "the training rows"
    examples: list[Example | None] = [*itertools.islice(templates.templates(own, file).each(rows), count)]
    kept = [example for example in examples if example]
    made = iter(build.tokens_of(trial, tokenizer, evaluations.rendered(own, kept, tokenizer, file=file)))
    for number, example in enumerate(examples, start=1):
        yield number, next(made) if example else None


def trained(row: Tokens) -> list[bool]:
    """Whether the loss is on each token: [tokens]. The first one is predicted from nothing, and never counts."""
    start = max(row.answer_start, 1)
    return [n >= start and (row.trained is None or row.trained[n]) for n in range(len(row.ids))]


def _summary(trial: Trial, row: Tokens | None) -> str:
    own = trial.config.dataset
    if row is None:
        return "left out, as it lacks a value (dataset.missing=drop)"
    parts = [f"{len(row.ids)} tokens"]
    if row.label is None:
        parts.append(f"{sum(trained(row))} trained on")
    else:
        from peftsweep.config import build

        parts.append(f"class {build.classes(trial)[row.label]}")
    cuts = {"beginning": row.lost_prompt, "end": row.lost_answer}
    if trial.config.model.task is Task.seq_cls:
        cuts = {"end": row.lost_prompt}
    parts += [f"{lost} cut off at its {place}" for place, lost in cuts.items() if lost]
    if own.drop_long and row.is_cut:
        parts.append("left out, as it is too long (dataset.drop_long)")
    return ", ".join(parts)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[bool]) -> Iterator[Piece]:
    """The text of ``ids``, special tokens included, in runs that are trained on and that are not.

    A run is what it adds to the text before it, as tokens decoded alone may lose their space or half a character.
    """
    before, end = "", 0
    for learned, run in itertools.groupby(mask):
        start, end = end, end + len(list(run))
        text = _decoded(tokenizer, ids[:end])
        whole = text.startswith(before)
        yield text[len(before) :] if whole else _decoded(tokenizer, ids[start:end]), learned
        before = text


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode([*ids], **options))


def marked(parts: Iterator[Piece] | Sequence[Piece], *, in_colour: bool) -> str:
    """The parts as one text, those that are trained on in green or in brackets; control characters as \\x1b."""
    return "".join(_marked(_plain(text), in_colour) if learned else _plain(text) for text, learned in parts)


def _plain(text: str) -> str:
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _marked(text: str, in_colour: bool) -> str:
    if not in_colour:
        return f"{OPEN}{text}{CLOSE}"
    return "\n".join(f"{GREEN}{line}{RESET}" if line else "" for line in text.split("\n"))  # pagers end it at a line
