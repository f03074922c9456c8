"""When a tool call is right."""

from __future__ import annotations

import json
import re
from typing import Any

from peftsweep.evaluation.metrics import Judgement

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S)


def same_call(prediction: str, answer: str) -> Judgement:
    """The same function with the same arguments. A prediction without a call that parses has nothing extracted."""
    call = parsed(prediction)
    return Judgement(call is not None and call == parsed(answer), None if call is None else json.dumps(call))


def parsed(text: str) -> dict[str, Any] | None:
    """The first call in ``text``; None where its tags, its JSON or its keys are not those of a call."""
    found = CALL.search(text)
    try:
        call = json.loads(found.group(1)) if found else None
    except json.JSONDecodeError:
        return None
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not isinstance(call.get("arguments"), dict)
    ):
        return None
    return call
