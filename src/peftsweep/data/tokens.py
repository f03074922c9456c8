"""Examples -> tokens, and which of them are trained on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsweep.data import chat
from peftsweep.data.chat import ChatTemplate, Conversation
from peftsweep.errors import InputError, first_line
from peftsweep.schema import Turns
from peftsweep.study.atomic import replacing
from peftsweep.study.reading import Unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from peftsweep.data.templates import Example


def through_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    chat_template: bool = True,
    turns: Turns = Turns.all,
    key: str = "dataset",
    file: str = "",
) -> list[Example]:
    """The same examples, rendered by the tokenizer's chat template, with the prompt of their last turn as text.

    An example that is not a conversation is rendered as two turns: the user's is its prompt, the assistant's its
    answer. Without ``chat_template``, conversations are laid out as plain text (``chat.PLAIN``), and other examples
    stay as they are.

    Raises:
        InputError: the tokenizer has no chat template or gives no offsets, or the template refuses a row.
    """
    if not chat_template and not any(row.conversation for row in rows):
        return list(rows)
    if chat_template and not tokenizer.chat_template:
        raise InputError("dataset.chat=true: the model's tokenizer has no chat template; dataset.chat=false needs none")
    if not tokenizer.is_fast:
        raise InputError(
            "dataset.chat: the model's tokenizer gives no offsets; must be a fast tokenizer, of the tokenizers library"
        )
    begin = str(tokenizer.decode([*leading_marks(tokenizer)]))
    template = ChatTemplate(tokenizer) if chat_template else chat.plain_layout(tokenizer, begin)
    return [
        _rendered(template, begin, row, turns, f"{key}: row {n} of {file}" if file else f"{key}: row {n}")
        for n, row in enumerate(rows, start=1)
    ]


def _rendered(template: ChatTemplate, begin: str, row: Example, turns: Turns, where: str) -> Example:
    def of_two_turns(prompt: str) -> Conversation:
        return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": row.answer}])

    try:
        if not row.conversation and not row.prompt.strip():
            raise ValueError("its prompt is empty; a user's turn needs a text")
        conversation = row.conversation or of_two_turns(row.prompt)
        rendered = chat.render(template, conversation, turns, row.written)
        choices = tuple(c._replace(prompt=chat.prompt(template, of_two_turns(c.prompt))) for c in row.choices)
    except Exception as error:  # a template may raise anything
        raise InputError(f"{where} does not go through the chat template: {' '.join(str(error).split())}") from error
    answer = rendered.last_turn if "tool_calls" in conversation.messages[-1] else row.answer
    return row._replace(prompt=rendered.prompt.removeprefix(begin), answer=answer, choices=choices, rendered=rendered)


def leading_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text, such as BOS."""
    plain, marked = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    starts = range(len(marked) - len(plain) + 1)
    return tuple(next((marked[:n] for n in starts if marked[n : n + len(plain)] == plain), ()))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Example], max_length: int = sys.maxsize
) -> list[list[int]]:
    """The token ids of prompts that the model continues, at least one token each.

    A prompt longer than ``max_length`` loses its beginning, except BOS.
    """
    marks = list(leading_marks(tokenizer))
    encoded = []
    for prompt in prompts:
        row = Example(prompt, "") if isinstance(prompt, str) else prompt
        before = [] if row.rendered else marks
        ids = [*before, *tokenizer(row.model_prompt, add_special_tokens=False).input_ids] or [_first(tokenizer)]
        kept = _kept(ids, marks, tokenizer.bos_token_id)
        encoded.append(ids if len(ids) <= max_length else ids[:kept] + ids[len(ids) - max_length + kept :])
    return encoded


def _first(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token of an empty text: BOS, else EOS, as in lm-evaluation-harness."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def _kept(ids: Sequence[int], marks: Sequence[int], bos: int | None) -> int:
    """The number of tokens at the beginning that a cut keeps: the marks before a text, or a template's BOS."""
    if marks and [*ids[: len(marks)]] == [*marks]:
        return len(marks)
    return int(bool(ids) and ids[0] == bos)


class Tokens(NamedTuple):
    """An example in token ids; the tokens from ``answer_start`` on are the answer and its end mark.

    For a classifier all tokens are the prompt, and the answer is ``label``, the number of its class. Where some
    tokens after ``answer_start`` are not the answer's, ``trained`` tells for each token whether it is: [tokens].
    ``lost_prompt`` and ``lost_answer`` count the tokens that were cut off to fit the length: at the beginning of
    the prompt (for a classifier at its end), and at the end of the answer.
    """

    ids: list[int]
    answer_start: int
    label: int | None = None
    trained: list[bool] | None = None
    lost_prompt: int = 0
    lost_answer: int = 0

    @property
    def answer_tokens(self) -> int:
        """The number of predictions in the loss: the tokens of the answer, or 1 for a class."""
        if self.label is not None:
            return 1
        return len(self.ids) - max(self.answer_start, 1) if self.trained is None else sum(self.trained[1:])

    @property
    def is_cut(self) -> bool:
        """Whether tokens were cut off to fit the length."""
        return self.lost_prompt + self.lost_answer > 0


def truncations(rows: Sequence[Tokens]) -> dict[str, int]:
    """How many rows have lost a part of their prompt, and how many of their answer."""
    return {
        "truncated_prompts": sum(row.lost_prompt > 0 for row in rows),
        "truncated_answers": sum(row.lost_answer > 0 for row in rows),
    }


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int, *, whole: bool = False
) -> list[Tokens]:
    """Tokenise prompt and answer separately, so that the tokens of the answer never depend on the prompt.

    An example longer than ``max_length`` loses the beginning of its prompt, except BOS; only an answer that is too
    long by itself loses its end. An example that a chat template rendered keeps the tokens of the template. With
    ``whole`` all tokens are trained on, those of the prompt too, and an example that is too long loses its end.
    """
    limit = min(max_length, tokenizer.model_max_length)
    marks = list(leading_marks(tokenizer))
    apart = iter(_apart(tokenizer, marks, [row for row in rows if not row.rendered]))
    found = [(row.rendered.ids, row.rendered.trained) if row.rendered else next(apart) for row in rows]
    if whole:
        return [Tokens(ids[:limit], 0, lost_answer=max(len(ids) - limit, 0)) for ids, _ in found]
    return [_shortened(ids, trained, _kept(ids, marks, tokenizer.bos_token_id), limit) for ids, trained in found]


def _apart(
    tokenizer: PreTrainedTokenizerBase, marks: list[int], rows: Sequence[Example]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Each row's prompt and answer in tokens, and whether each of them is the answer's."""
    if not rows:
        return
    prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False).input_ids
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False).input_ids
    for prompt, answer in zip(prompts, answers, strict=True):
        before, trained = [*marks, *prompt], [*answer, tokenizer.eos_token_id]
        yield before + trained, [False] * len(before) + [True] * len(trained)


def _shortened(ids: list[int], trained: list[bool], kept: int, limit: int) -> Tokens:
    """At most ``limit`` tokens: the first ``kept`` ones and the last ones, with the last answer as far as it fits."""
    lost_prompt = lost_answer = 0
    if (surplus := len(ids) - limit) > 0:
        if limit < max(kept, 1) + 1:
            raise InputError(f"max_length={limit}: leaves no room for an answer; must be at least {max(kept, 1) + 1}")
        end = len(trained) - trained[::-1].index(True)
        start = next((n + 1 for n in range(end - 1, -1, -1) if not trained[n]), 0)  # of the last answer
        first = min(kept + surplus, max(start, 1) - (kept == 0))
        places = [*range(kept), *range(max(first, kept), len(ids))][:limit]
        lost_answer = len(ids) - 1 - places[-1]
        lost_prompt = surplus - lost_answer
        ids, trained = [ids[n] for n in places], [trained[n] for n in places]
    start = trained.index(True)
    return Tokens(ids, start, None, None if all(trained[start:]) else trained, lost_prompt, lost_answer)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int, *, marked: bool = False
) -> list[Tokens]:
    """Tokenise each context and its continuation as one text, as lm-evaluation-harness does, without an end mark.

    White space at the end of a context counts as part of the continuation. A continuation that the tokenizer joins with
    the last token of its context, as ``A`` with ``(``, would have no token of its own, and a likelihood of 1: the two
    are tokenised apart. ``marked`` contexts hold their special tokens as text, as those of a chat template do. A pair
    longer than ``max_length`` loses its beginning, except BOS.

    Raises:
        InputError: a continuation has no tokens.
    """
    limit = min(max_length, tokenizer.model_max_length)
    marks = [] if marked else list(leading_marks(tokenizer))
    contexts = [context.rstrip() for context, _ in pairs]
    starts = tokenizer(contexts, add_special_tokens=False).input_ids
    wholes = tokenizer([context + following for context, following in pairs], add_special_tokens=False).input_ids
    rows = []
    for whole, begun, context, pair in zip(wholes, starts, contexts, pairs, strict=True):
        length = len(begun)
        if len(whole) <= length:
            continuation = "".join(pair)[len(context) :]
            following_ids = tokenizer([continuation], add_special_tokens=False).input_ids[0]
            if not following_ids:
                raise InputError(f"the answer {continuation!r} has no tokens, so it has no likelihood; must be a text")
            whole = begun + following_ids
        before = marks or ([] if length else [_first(tokenizer)])
        ids, start = [*before, *whole], len(before) + length
        kept = _kept(ids, marks, tokenizer.bos_token_id)
        cut = max(0, len(ids) - limit)
        lost_answer = max(cut - (start - kept), 0)
        short, first = ids[:kept] + ids[kept + cut :], max(start - cut, kept, 1)
        rows.append(Tokens(short, first, lost_prompt=cut - lost_answer, lost_answer=lost_answer))
    return rows


def tokenize_for_classes(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int, classes: Sequence[str]
) -> list[Tokens]:
    """Tokenise prompts for a classifier, with the tokenizer's special tokens around them, and number their class.

    A prompt longer than ``max_length`` loses its end.
    """
    limit = min(max_length, tokenizer.model_max_length)
    rendered = any(row.rendered for row in rows)

    def encoded(rows: Sequence[Example], **cut: Any) -> list[list[int]]:
        found: Any = tokenizer([row.model_prompt for row in rows], add_special_tokens=not rendered, **cut)
        return list(found.input_ids)

    found = []
    for row, whole in zip(rows, encoded(rows), strict=True):
        ids = whole if len(whole) <= limit else encoded([row], truncation=True, max_length=limit)[0]
        label = classes.index(row.answer.strip())
        found.append(Tokens(ids, len(ids), label, lost_prompt=len(whole) - len(ids)))
    return found


def write_tokens(file: Path, rows: Sequence[Tokens]) -> None:
    """Write tokenised rows to a parquet file, atomically."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = zip(*rows, strict=True) if rows else ((),) * len(Tokens._fields)
    schema = _tokens_schema()
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    with replacing(file) as temporary:
        pa.parquet.write_table(pa.table(arrays, schema=schema), temporary, write_page_checksum=True)


def _tokens_schema() -> Any:
    import pyarrow as pa

    kinds = (pa.list_(pa.int32()), pa.int32(), pa.int32(), pa.list_(pa.bool_()), pa.int32(), pa.int32())
    return pa.schema(zip(Tokens._fields, kinds, strict=True))


def read_tokens(file: Path, count: int | None = None) -> list[Tokens]:
    """Read the ``count`` rows that ``write_tokens`` wrote.

    Raises:
        Unreadable: the file holds something else.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).read()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Unreadable(f"{file}: {first_line(error)}") from None
    same = table.schema.equals(_tokens_schema()) and count in (None, table.num_rows)
    if not same or any(table[name].null_count for name in Tokens._fields if name not in ("label", "trained")):
        raise Unreadable(f"{file}: holds other columns or rows than were written")
    return [Tokens(*row) for row in zip(*(table[name].to_pylist() for name in Tokens._fields), strict=True)]
