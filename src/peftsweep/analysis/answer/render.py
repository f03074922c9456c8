"""An answer -> Markdown, plain text, HTML and cells of tables: the same sentences and figures in each."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peftsweep.analysis.answer.structure import USE, Answer, Column, Section, Table
from peftsweep.analysis.text import words
from peftsweep.observe.display import size

# ---- cells -------------------------------------------------------------------------------------------


def cell(row: Mapping[str, Any], column: Column) -> str:
    """The text of a cell; empty where nothing was measured."""
    value = row.get(column.key)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    text = _amount(value, column)
    low, high = row.get(f"{column.key}.low"), row.get(f"{column.key}.high")
    return text if low is None or high is None else f"{text} [{_amount(low, column)}, {_amount(high, column)}]"


def _amount(value: float, column: Column) -> str:
    if column.unit == "bytes":
        return size(value)
    if column.unit == "seconds":
        return words.seconds(value)
    if column.unit == "share":
        return f"{value:.1%}"
    if column.unit == "change":
        return words.amount(value, "ratio", signed=True)
    if column.unit == "count":
        return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    return words.number(value)


# ---- Markdown ----------------------------------------------------------------------------------------


def markdown(section: Section) -> Iterator[str]:
    """The section as lines of Markdown; of a table at most ``words.ROWS`` rows."""
    yield f"## {heading(section)}"
    yield ""
    if section.sentences:
        yield from (f"- {sentence}" for sentence in section.sentences)
        yield ""
    for table in section.tables:
        if table.title:
            yield f"**{table.title}**"
            yield ""
        yield from words.table([{c.title: cell(row, c) for c in table.columns} for row in table.rows[: words.ROWS]])
        yield from (line for text in notes(table, words.ROWS) for line in (text, ""))


def heading(section: Section) -> str:
    """The title of the section, with its model and dataset where there are several."""
    return f"{section.title} ({section.task})" if section.task else section.title


def notes(table: Table, rows: int) -> Iterator[str]:
    """What stands below a table."""
    if table.note:
        yield table.note
    if left := table.left_out + max(0, len(table.rows) - rows):
        yield f"{words.plural('more row', left)} {'is' if left == 1 else 'are'} in results.parquet."


# ---- plain text --------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A sentence without marks of Markdown; code in it, such as a command, is unchanged."""
    return "".join(piece if is_code else _unmarked(piece) for is_code, piece in _pieces(text))


def _pieces(sentence: str) -> Iterator[tuple[bool, str]]:
    """The parts of a sentence, each with whether it is code."""
    parts = re.split(r"(?<!\\)(`+)(?!`)(.+?)(?<!`)\1(?!`)", sentence)
    for place in range(0, len(parts), 3):
        yield False, parts[place]
        if place + 2 < len(parts):
            inside = parts[place + 2]
            padded = inside.startswith(" ") and inside.endswith(" ") and "`" in inside
            yield True, inside[1:-1] if padded else inside


def _unmarked(text: str) -> str:
    unlinked = re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text).replace("**", "")
    return re.sub(r"\\([\\`*\[\]<~_&:.])", r"\1", unlinked).replace(r"www\.", "www.")


def lines(answer: Answer) -> list[str]:
    """What a terminal shows of the answer before its table: each section's title and sentences."""
    found: list[str] = []
    for section in answer.sections:
        if section.sentences:
            if section.name != USE or section.task:
                found.append(f"{heading(section)}:")
            indent = "" if section.name == USE else "  "
            most = SENTENCES if len(section.sentences) > SENTENCES + 1 else len(section.sentences)
            found += [indent + plain(sentence) for sentence in section.sentences[:most]]
            if left := len(section.sentences) - most:
                found.append(f"{indent}{left} more sentences on this are in RESULTS.md.")
    return found


TRAIN = "Train it with: "  # how the line of a command begins
SENTENCES = 8  # of a section that a terminal shows; the reports have all


# ---- HTML --------------------------------------------------------------------------------------------


def as_html(section: Section) -> str:
    """The sentences and tables of a section, all text escaped."""
    parts = [f"<p>{inline(sentence)}</p>" for sentence in section.sentences]
    for table in section.tables:
        head = "".join(f"<th>{html.escape(column.title)}</th>" for column in table.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell(row, column))}</td>" for column in table.columns) + "</tr>"
            for row in table.rows
        )
        title = f"<h3>{html.escape(table.title)}</h3>" if table.title else ""
        under = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes(table, len(table.rows)))
        parts.append(f"{title}<div class='wide'><table class='plain'><tr>{head}</tr>{body}</table></div>{under}")
    return "\n".join(parts)


def inline(sentence: str) -> str:
    """A sentence's marks of strength and of code as HTML; everything else as text."""
    found = []
    for is_code, piece in _pieces(sentence):
        if is_code:
            found.append(f"<code>{html.escape(piece)}</code>")
        else:
            strong = re.split(r"\*\*", piece)  # each second part
            found += [
                f"<b>{html.escape(_unmarked(p))}</b>" if n % 2 else html.escape(_unmarked(p))
                for n, p in enumerate(strong)
            ]
    return "".join(found).replace("<b></b>", "")
