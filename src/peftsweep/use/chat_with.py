"""``peftsweep-chat``: text written by the model that a trial has trained, and by its base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsweep import limits, shorthand
from peftsweep.command_line import OneLineParser, check_key_values, number, whole_number
from peftsweep.data import layouts, templates
from peftsweep.data.conversations.reader import READERS
from peftsweep.errors import InputError, suggest
from peftsweep.schema import DatasetConfig, Task, Turns
from peftsweep.study import store
from peftsweep.study.record import RESULT, RecordError, Result

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from peftsweep.config.compose import Trial
    from peftsweep.data.chat import Message
    from peftsweep.data.templates import Example
    from peftsweep.evaluation.decoding import Sampling

TRAINED, BASE = "trained", "base"
COLDEST = 1e-30  # logits divided by a lower temperature may leave the range of float32
ANSWER = "answer"  # in the place of the turn that is to be written, as a template renders whole conversations


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = OneLineParser(
        prog="peftsweep-chat",
        description="Write text with the model that a trial has trained. A prompt is put into the template of the "
        "trial's training rows. Without --prompt each line of standard input is one; where the dataset is put through "
        "a chat template they are turns of a conversation, and an empty line begins a new one.",
    )
    made.add_argument("trial", metavar="TRIAL_DIR", help="a trial's folder, multirun/STUDY/TRIAL")
    made.add_argument(
        "words", nargs="*", default=[], metavar="KEY=VALUE", help="of the trial, such as device=cpu quant=none"
    )
    made.add_argument("--prompt", metavar="TEXT", help="write one text after it, and end")
    made.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a further column of the template, such as context; may be given several times",
    )
    made.add_argument("--raw", action="store_true", help="the prompt as it stands, in no template")
    made.add_argument("--system", metavar="TEXT", help="the system's turn, which conversations begin with")
    made.add_argument("--base", action="store_true", help="the untouched base's text as well")
    made.add_argument(
        "--temperature",
        type=number(lambda t: t == 0 or t >= COLDEST, f"0 or at least {COLDEST:g}"),
        metavar="T",
        help="draw tokens at it, as transformers does (default: 0, the likeliest)",
    )
    made.add_argument(
        "--top-p",
        type=number(lambda p: 0 < p <= 1, "above 0 and at most 1"),
        metavar="P",
        help="draw from the likeliest tokens that have this probability together",
    )
    made.add_argument(
        "--max-new-tokens", type=whole_number(1), default=256, metavar="N", help="longest text (default: 256)"
    )
    made.add_argument(
        "--seed",
        type=whole_number(0, limits.LARGEST_SEED),
        default=0,
        metavar="N",
        help="of the tokens drawn (default: 0)",
    )
    return made


def main(options: argparse.Namespace, compose: Callable[..., Trial]) -> int:
    """Write the texts that the options ask for; ``compose`` makes a trial of words, whose data are not looked at.

    Raises:
        InputError: the folder holds no trial with a saved language model, or an option is wrong.
    """
    trial = compose(*_words(options, trained_language_model(Path(options.trial))))
    if options.system is not None and not _converses(trial):
        raise InputError(f"--system: {options.trial} was trained on plain texts, which have no turns")
    form = Form.of(trial.config.dataset, options.column, raw=options.raw)
    form.filled(ANSWER)  # is a column missing?
    writer = Writer.load(trial, options, form)
    if options.prompt is not None:
        for name, text in writer.texts(options.prompt):
            _print(name, text, named=options.base)
        return 0
    for line in _lines(trial, form):
        if not line.strip():
            writer.begin()
            continue
        for name, text in writer.texts(line):
            _print(name, text, named=options.base)
    return 0


def trained_language_model(folder: Path) -> Path:
    """The folder of a trial that has saved a model which writes text.

    Raises:
        InputError: it is no such folder.
    """
    place = folder.expanduser()
    if place.name == store.ADAPTER and not (place / RESULT).exists() and (place.parent / RESULT).exists():
        place = place.parent
    if not (place / RESULT).exists():
        study = any(place.glob(f"*/{RESULT}")) if place.is_dir() else False
        what = f"holds no {RESULT}" if place.is_dir() else "is a file" if place.exists() else "no such folder"
        what = "holds several trials" if study else what
        raise InputError(f"{folder}: {what}; must be a trial's folder, multirun/STUDY/TRIAL")
    try:
        held = Result.read(place)
    except RecordError as error:
        raise InputError(str(error)) from None
    if (held.config.get("model") or {}).get("task") == Task.seq_cls.name:
        raise InputError(f"{folder}: its model is a classifier, which writes no text")
    try:
        store.adapter(str(place))
    except InputError:
        ended = "" if held.run_info.get("status") in (None, "success") else f" (it ended as {held.run_info['status']})"
        raise InputError(
            f"{folder}: the trial has no saved adapter{ended}; adapter.save=true keeps one, and "
            "peftsweep-collect --prune removes it"
        ) from None
    return place


def _words(options: argparse.Namespace, place: Path) -> list[str]:
    check_key_values(options.words)
    return [shorthand.override("adapter.path", str(place)), *options.words]


def _converses(trial: Trial) -> bool:
    """Whether the trial's rows are turns, by the chat template or laid out plainly; texts have no prompts."""
    own = trial.config.dataset
    return own.reader in READERS or bool(own.chat and own.prompt)


@dataclass(frozen=True)
class Form:
    """The form of a training row for a prompt: a ``column`` of the dataset's template, beside ``others``."""

    dataset: DatasetConfig
    column: str | None = None  # None: the prompt stands as it is
    others: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, own: DatasetConfig, given: Sequence[str], *, raw: bool) -> Form:
        """The form of a dataset's prompts, with columns ``given`` as NAME=TEXT.

        Raises:
            InputError: a column is none of the template's, or several columns may be the prompt.
        """
        if wrong := next((word for word in given if "=" not in word), None):
            raise InputError(f"--column={wrong}: must be NAME=TEXT")
        others = {name: text for name, _, text in (word.partition("=") for word in given)}
        names = () if raw or own.reader in READERS else templates.columns(own.prompt)
        if not names:
            if others:
                raise InputError(f"--column={given[0]}: these prompts are put into no template")
            return cls(own)
        known = [*dict.fromkeys(names)]
        if own.reader is None and (wrong := next((name for name in others if name not in known), None)):
            raise InputError(f"--column: the template has no column '{wrong}'; {suggest(wrong, known)}")
        left = [name for name in known if name not in others]
        likely = left if len(left) == 1 else [name for name in layouts.PROMPTS if name in left]
        if not likely:
            listed = ", ".join(known)
            raise InputError(f"--column: the template has the columns {listed}; give all but the one that --prompt is")
        return cls(own, likely[0], others)

    def filled(self, prompt: str) -> str:
        """The prompt in the template.

        Raises:
            InputError: a column is missing.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the shell that are no text
            raise InputError("--prompt: is not UTF-8") from None
        if self.column is None:
            return prompt
        row: dict[str, Any] = self.others | {self.column: prompt}
        if read := templates.find_reader(self.dataset.reader):
            with suppress(*layouts.READER_ERRORS):  # of a reader that needs the row's answer too
                row = read(dict(row))
        if lacking := [name for name in templates.columns(self.dataset.prompt) if name not in row]:
            raise InputError(
                f"--column: the template {self.dataset.prompt!r} needs {', '.join(lacking)} beside {self.column}, such "
                f"as --column {lacking[0]}=TEXT; --raw takes the prompt as it stands"
            )
        return templates.examples([row], self.dataset.prompt, "", "--prompt")[0].prompt


def _lines(trial: Trial, form: Form) -> Iterator[str]:
    """The lines of standard input; in a terminal with a prompt for each."""
    in_terminal = sys.stdin is not None and sys.stdin.isatty()
    if in_terminal:
        kind = "a turn" if _converses(trial) else "the beginning of a text"
        where = f", put as {form.column} into {form.dataset.prompt!r}" if form.column else ""
        print(f"Each line is {kind}{where}. An empty line begins anew, Ctrl-D ends.", file=sys.stderr)
    while True:
        if in_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline() if sys.stdin is not None else ""
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: is not {error.encoding} ({error.reason})") from None
        if not line:
            return
        yield line.removesuffix("\n")


def _print(name: str, text: str, *, named: bool) -> None:
    print(f"{name}: {text}" if named else text, flush=True)


@dataclass
class Writer:
    """The models that write, and the conversation of each so far."""

    trial: Trial
    form: Form
    tokenizer: PreTrainedTokenizerBase
    models: dict[str, nn.Module]  # by the names that are printed; the base, with --base, first
    max_new_tokens: int
    sampling: Sampling | None
    seed: int
    system: str | None = None
    histories: dict[str, list[Message]] = field(default_factory=dict)
    drawn: int = 0  # texts so far, each of which has a seed of its own

    @classmethod
    def load(cls, trial: Trial, options: argparse.Namespace, form: Form) -> Writer:
        """Load the trial's base and its saved weights onto its device."""
        import transformers

        from peftsweep.config import build
        from peftsweep.evaluation.decoding import Sampling
        from peftsweep.models import model
        from peftsweep.observe.streams import without_warnings

        transformers.utils.logging.disable_progress_bar()
        with without_warnings():
            tokenizer = build.load_tokenizer(trial)
            if options.max_new_tokens >= (room := tokenizer.model_max_length):
                raise InputError(
                    f"--max-new-tokens={options.max_new_tokens}: must be below {room}, which the model sees at once"
                )
            load = partial(build.load_base, trial, tokenizer, model.device(trial.config.device))
            # Loaded twice: the initialisation of some methods, such as PiSSA, changes the base that they are put on.
            models: dict[str, nn.Module] = {BASE: load()} if options.base else {}
            base = load()
            models[TRAINED] = build.restore(trial, base, store.adapter(str(trial.config.adapter.path)))
        given = {"temperature": options.temperature, "top_p": options.top_p}
        given = {key: value for key, value in given.items() if value is not None}
        sampling = Sampling(**given) if given and options.temperature != 0 else None
        return cls(trial, form, tokenizer, models, options.max_new_tokens, sampling, options.seed, options.system)

    def begin(self) -> None:
        """Forget the conversation so far."""
        self.histories.clear()

    def texts(self, prompt: str) -> Iterator[tuple[str, str]]:
        """The text that each model writes after the prompt; in a conversation the prompt is the user's next turn.

        Raises:
            InputError: the chat template refuses it, or there is no room for so many new tokens.
        """
        import torch

        from peftsweep.data.tokens import prompt_ids
        from peftsweep.evaluation import decoding
        from peftsweep.observe.streams import without_warnings

        if _converses(self.trial) and not prompt.strip():
            raise InputError("--prompt: is empty, which is no user's turn")
        prompt = self.form.filled(prompt)
        for name, one in self.models.items():
            torch.manual_seed(self.seed + self.drawn)
            with without_warnings():  # those of a training, which would come with each turn
                model_input = self._in_training_form(name, prompt)
                length = len(prompt_ids(self.tokenizer, [model_input])[0])
                text = decoding.generate(
                    one,
                    self.tokenizer,
                    [model_input],
                    max_new_tokens=self.max_new_tokens,
                    max_length=sys.maxsize,
                    sampling=self.sampling,
                )[0]
            if length > (room := self.tokenizer.model_max_length - self.max_new_tokens):
                print(
                    f"peftsweep: of the prompt's {length:,} tokens the model saw the last {room:,}, as it sees "
                    f"{self.tokenizer.model_max_length:,} at once, those to be written included",
                    file=sys.stderr,
                )
            if _converses(self.trial):
                self.histories[name] += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            yield name, text
        self.drawn += 1

    def _in_training_form(self, name: str, prompt: str) -> str | Example:
        from peftsweep.data.chat import Conversation
        from peftsweep.data.templates import Example
        from peftsweep.data.tokens import through_chat_template

        if not _converses(self.trial):
            return prompt
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        history = self.histories.setdefault(name, system)
        turns: list[Any] = [*history, {"role": "user", "content": prompt}, {"role": "assistant", "content": ANSWER}]
        row = Example(prompt, ANSWER, conversation=Conversation(turns))
        own = self.trial.config.dataset
        return through_chat_template(self.tokenizer, [row], chat_template=own.chat, turns=Turns.last, key="--prompt")[0]
