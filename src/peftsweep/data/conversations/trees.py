"""Trees of messages, in which people have written several replies to one -> the path of the replies ranked best.

The layouts are those of OpenAssistant (arXiv 2304.07327): a row a message, or a row a tree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
MESSAGE_COLUMNS = ("message_id", "parent_id", "text", "role")  # of a row a message


def are_messages(rows: Sequence[Row]) -> bool:
    """Whether each row is a message of a tree."""
    return bool(rows) and all(column in row for row in rows for column in MESSAGE_COLUMNS)


def is_tree(row: Row) -> bool:
    """Whether a row is a whole tree, with the first message as its ``prompt``."""
    first = row.get("prompt")
    return isinstance(first, Mapping) and "text" in first and "replies" in first


def joined(rows: Sequence[Row]) -> list[Row]:
    """Rows that are messages as conversations, one a tree that has a reply; others as they are.

    A message whose ``parent_id`` is in none of the rows begins no conversation.
    """
    if not are_messages(rows):
        return list(rows)
    replies: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        replies[row["parent_id"]].append(row)
    made = []
    for first in replies.pop(None, []):
        said = _answered(_best([first], lambda message: replies.get(message["message_id"], ())))
        if said:
            made.append({"messages": said, "message_tree_id": first["message_id"], "lang": first.get("lang")})
    return made


def turns(row: Row) -> list[Row]:
    """The turns of a whole tree."""
    return _answered(_best([row["prompt"]], lambda message: message.get("replies") or ()))


def _best(begun: list[Row], replies: Any) -> list[Row]:
    """``begun`` and after it the best reply to each message: of the lowest rank, else the first."""
    while there := [reply for reply in replies(begun[-1]) if not reply.get("deleted")]:
        begun.append(min(there, key=_rank))
    return begun


def _rank(message: Row) -> float:
    rank = message.get("rank")
    return math.inf if rank is None else float(rank)


def _answered(path: Iterable[Row]) -> list[Row]:
    """The messages as turns, up to the last reply of the assistant."""
    said = [{"role": message["role"], "content": message["text"]} for message in path]
    while said and said[-1]["role"] != "assistant":
        said.pop()
    return said
