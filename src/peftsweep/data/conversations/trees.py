"""Trees of messages, in which a message has several replies -> the path of the best ranked replies.

The layouts are those of OpenAssistant (arXiv 2304.07327): each row is a message, or each row is a tree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
MESSAGE_COLUMNS = ("message_id", "parent_id", "text", "role")  # of rows that are messages


def are_messages(rows: Sequence[Row]) -> bool:
    """Whether each row is a message of a tree."""
    return bool(rows) and all(column in row for row in rows for column in MESSAGE_COLUMNS)


def is_tree(row: Row) -> bool:
    """Whether a row is a whole tree, with the first message as its ``prompt``."""
    first = row.get("prompt")
    return isinstance(first, Mapping) and "text" in first and "replies" in first


def joined(rows: Sequence[Row]) -> list[Row]:
    """Rows that are messages, joined to one conversation for each tree with a reply; other rows stay as they are.

    A message whose ``parent_id`` is in none of the rows starts no conversation.
    """
    if not are_messages(rows):
        return list(rows)
    replies: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        replies[row["parent_id"]].append(row)
    made = []
    for first in replies.pop(None, []):
        path = _answered(_best([first], lambda message: replies.get(message["message_id"], ())))
        if path:
            made.append({"messages": path, "message_tree_id": first["message_id"], "lang": first.get("lang")})
    return made


def turns(row: Row) -> list[Row]:
    """The turns of a whole tree."""
    return _answered(_best([row["prompt"]], lambda message: message.get("replies") or ()))


def _best(begun: list[Row], replies: Any) -> list[Row]:
    """``begun``, continued with the best reply to each message: that of the lowest rank, else the first."""
    while there := [reply for reply in replies(begun[-1]) if not reply.get("deleted")]:
        begun.append(min(there, key=_rank))
    return begun


def _rank(message: Row) -> float:
    rank = message.get("rank")
    return math.inf if rank is None else float(rank)


def _answered(path: Iterable[Row]) -> list[Row]:
    """The messages as turns, up to the last reply of the assistant."""
    found = [{"role": message["role"], "content": message["text"]} for message in path]
    while found and found[-1]["role"] != "assistant":
        found.pop()
    return found
