"""Conversations with tool calls, made from a seed: python gallery/chat/conversations.py FOLDER

Writes train.jsonl (a user asks two things, and the assistant calls a function for each and says what came back),
calls.jsonl (the last turn is a call) and answers.jsonl (the last turn says what came back). Places, titles and numbers
of the test files are in no training row. The model's chat template knows roles and texts and no tools, so that the
functions stand in the system's turn and a call is text between <tool_call> tags, as SmolLM2's larger models write it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Turn = dict[str, str]
SYSTEM = (
    "Functions: weather(city), timer(minutes), play(title). "
    'Call as <tool_call>{"name": ..., "arguments": ...}</tool_call>'
)
CITIES = [
    *("Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Delhi", "Quito", "Rome"),
    *("Bern", "Dublin", "Athens", "Hanoi", "Lagos", "Seoul", "Vienna", "Sofia"),
]
TITLES = [
    *("Hello", "Yesterday", "Imagine", "Respect", "Roar", "Happy"),
    *("Thriller", "Jolene", "Heroes", "Dreams", "Halo", "Creep"),
]
HELD_OUT = 4  # cities and titles of the test rows


def weather(draw: random.Random, tested: bool) -> list[Turn]:
    """A city and its degrees."""
    city, degrees = draw.choice(_part(CITIES, tested)), draw.randrange(1, 35, 2) + tested
    request = draw.choice(["How warm is it in {}?", "What is the weather in {}?", "Is it cold in {} today?"]).format(
        city
    )
    return _exchange(request, "weather", {"city": city}, {"degrees": degrees}, f"It is {degrees} degrees in {city}.")


def timer(draw: random.Random, tested: bool) -> list[Turn]:
    """A number of minutes."""
    minutes = draw.randrange(2, 60, 2) + tested
    request = draw.choice(
        ["Wake me in {} minutes.", "Set a timer of {} minutes.", "Remind me after {} minutes, please."]
    )
    reply = f"Your timer rings in {minutes} minutes."
    return _exchange(request.format(minutes), "timer", {"minutes": minutes}, {"started": True}, reply)


def play(draw: random.Random, tested: bool) -> list[Turn]:
    """A title, which is found or not."""
    title = draw.choice(_part(TITLES, tested))
    request = draw.choice(["Play {}.", "Can I hear {}?", "Put on {}, please."]).format(title)
    if draw.random() < 0.5:
        return _exchange(request, "play", {"title": title}, {"error": "not found"}, f"I could not find {title}.")
    return _exchange(request, "play", {"title": title}, {"playing": title}, f"Now playing {title}.")


KINDS: list[Callable[[random.Random, bool], list[Turn]]] = [weather, timer, play]


def _part(names: list[str], tested: bool) -> list[str]:
    return names[:HELD_OUT] if tested else names[HELD_OUT:]


def _exchange(
    request: str, name: str, arguments: dict[str, object], result: dict[str, object], reply: str
) -> list[Turn]:
    call = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    turns = [("user", request), ("assistant", call), ("tool", json.dumps(result)), ("assistant", reply)]
    return [{"role": role, "content": text} for role, text in turns]


def conversations(count: int, seed: int, last: int | None, tested: bool) -> Iterator[dict[str, list[Turn]]]:
    """``count`` conversations of two exchanges; ``last`` cuts the second after so many of its four turns."""
    draw = random.Random(seed)
    for _ in range(count):
        first, second = (kind(draw, tested) for kind in draw.sample(KINDS, 2))
        yield {"messages": [{"role": "system", "content": SYSTEM}, *first, *second[:last]]}


def main(folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed, last in (("train", 400, 0, None), ("calls", 100, 1, 2), ("answers", 100, 2, None)):
        rows = conversations(count, seed, last, tested=name != "train")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
