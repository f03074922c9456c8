"""The prompts of the inference benchmark, the length of its answers and the number of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsweep.data.rows import read_rows
from peftsweep.errors import InputError, suggest

OVERALL, ADAPTER = "overall", "adapter"  # nodes of the figures beside the categories
SHIPPED = Path(__file__).parent / "prompts.json"


# ---- what is written to what -----------------------------------------------------------------------


@dataclass(frozen=True)
class Category:
    """Prompts of one kind: their texts, the tokens written to each, and those it is made to have (None: its own)."""

    texts: list[str]
    new_tokens: int
    prompt_tokens: int | None = None


def plan(
    categories: Mapping[str, Mapping[str, Any] | None],
    prompts_file: str | None = None,
    *,
    samples: int = 5,
    runs: int = 6,
    warmup: int = 1,
    batch_sizes: Sequence[int] = (1, 4, 16),
    **_: Any,
) -> dict[str, Category]:
    """The categories with their texts: all of ``benchmark``'s options that can be checked without a model.

    Raises:
        InputError: a number out of range, an unknown option, or a file that cannot be read or lacks a category.
    """
    least = [("samples", samples, 1), ("runs", runs, 1), ("warmup", warmup, 0)]
    for key, number, smallest in [*least, *(("batch_sizes", size, 1) for size in batch_sizes)]:
        _at_least(f"inference.{key}", number, smallest)
    if not batch_sizes or len(set(batch_sizes)) < len(batch_sizes):
        raise InputError(f"inference.batch_sizes={list(batch_sizes)}: must be at least one number, each once")
    wanted = {name: node for name, node in categories.items() if node is not None}
    if not wanted:
        raise InputError("inference.categories: must name at least one category")
    lists = read_prompts(prompts_file)
    return {name: _category(name, node, lists, samples) for name, node in wanted.items()}


def read_prompts(file: str | None = None) -> dict[str | None, list[str]]:
    """The prompts by category: the shipped ones, or those of a .json (category -> prompts), or of rows.

    Rows have a column ``prompt`` or ``text``, and perhaps ``category``; those without belong to every category (None).

    Raises:
        InputError: the file cannot be read, or is made up otherwise.
    """
    key = f"inference.prompts_file={file}"
    lists: dict[str | None, list[str]] = {}
    if file is None or (Path(file).suffix == ".json" and Path(file).is_file()):
        try:
            content = json.loads(Path(file or SHIPPED).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{key}: cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(content, dict) or not all(map(_is_texts, content.values())):
            raise InputError(f'{key}: must be an object of lists of prompts, such as {{"short": ["..."]}}')
        lists |= content
        return lists
    for n, row in enumerate(read_rows(file, "inference.prompts_file"), start=1):
        text = row.get("prompt", row.get("text"))
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{key}: row {n} needs a text as its 'prompt' or 'text'; it has: {', '.join(row)}")
        lists.setdefault(row.get("category"), []).append(text)
    return lists


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _category(name: str, node: Mapping[str, Any], lists: Mapping[str | None, list[str]], samples: int) -> Category:
    key = f"inference.categories.{name}"
    if name in (OVERALL, ADAPTER):
        raise InputError(f"{key}: the name is that of other figures; take another than {OVERALL} and {ADAPTER}")
    known = ["new_tokens", "prompt_tokens", "prompts"]
    for option in node:
        if option not in known:
            raise InputError(f"{key}.{option}: no such option; {suggest(option, known)}")
    _at_least(f"{key}.new_tokens", node.get("new_tokens"), 1)
    if node.get("prompt_tokens") is not None:
        _at_least(f"{key}.prompt_tokens", node["prompt_tokens"], 1)
    wanted = node.get("prompts") or name
    texts = lists.get(wanted) or lists.get(None)
    if not texts:
        names = ", ".join(str(found) for found in lists)
        raise InputError(f"{key}.prompts={wanted}: inference.prompts_file has no such prompts; there are: {names}")
    return Category(texts[:samples], node["new_tokens"], node.get("prompt_tokens"))


def _at_least(key: str, number: Any, smallest: int) -> None:
    if type(number) is not int or number < smallest:
        raise InputError(f"{key}={number}: must be a whole number of at least {smallest}")
