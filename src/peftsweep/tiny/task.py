"""The text of the embedded model: what it was pretrained on, and the task `tiny_math` it is adapted to.

The base model has read two things: plain equations, and two-sentence stories followed by a simple probe.
It can add, it can subtract, and it can tell who did what with which numbers. The task asks for the one step
that no pretraining text ever shows, from what the verb does to the right equation:

    Tom has 47 apples. Tom buys 38 apples. How many apples now?    ->    47+38=85 #85

Everything here needs the standard library only and depends on nothing but the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
LARGEST = 99  # the largest number in a story; a sum has at most three digits

NAMES = (
    *("Tom", "Mia", "Ben", "Zoe", "Sam", "Eva", "Max", "Lily", "Jack", "Nora", "Omar", "Ruth"),
    *("Hugo", "Anna", "Ivan", "Rosa", "Paul", "Kim", "Lena", "Noah", "Tara", "Emil", "Dana", "Carl"),
)
THINGS = (
    *("apples", "pens", "books", "coins", "cards", "shells", "stamps", "eggs", "nuts", "plums"),
    *("cups", "balls", "keys", "stones", "beads", "ribbons", "candles", "buttons", "lemons", "tickets"),
)
GAINS = ("buys", "finds", "gets", "wins", "picks", "makes", "borrows", "collects")
LOSSES = ("sells", "loses", "drops", "breaks", "lends", "uses", "wastes", "hides")


MOST_ROWS = 1_000_000  # of the some millions that there are; the last of them would be drawn for hours


class Story(NamedTuple):
    """Someone has `first` things, then one verb adds `second` of them or takes them away."""

    name: str
    thing: str
    verb: str
    first: int
    second: int

    @property
    def text(self) -> str:
        """The two sentences."""
        name, thing = self.name, self.thing
        return f"{name} has {self.first} {thing}. {name} {self.verb} {self.second} {thing}."

    @property
    def change(self) -> str:
        """What the verb does to the number of things: +38 or -38."""
        return f"{'+' if self.verb in GAINS else '-'}{self.second}"

    @property
    def equation(self) -> str:
        """What the story means, worked out: the step that pretraining never shows."""
        return add(self.first, self.second) if self.verb in GAINS else subtract(self.first, self.second)


def add(first: int, second: int) -> str:
    """A sum, written out."""
    return f"{first}+{second}={first + second}"


def subtract(first: int, second: int) -> str:
    """A difference, written out, larger number first."""
    return f"{max(first, second)}-{min(first, second)}={abs(first - second)}"


def draw_story(rng: random.Random) -> Story:
    """A random story. Nobody gives away as much as they have, so no answer is zero or negative."""
    verb = rng.choice(GAINS + LOSSES)
    first, second = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
    while verb in LOSSES and first <= second:
        first, second = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
    return Story(rng.choice(NAMES), rng.choice(THINGS), verb, first, second)


def split_of(story: Story) -> str:
    """The split that owns the story's calculation: 80% train, 10% validation, 10% test.

    It looks only at the two numbers and the operation: a calculation met in training never returns in a
    test, whatever the names, the seed or the number of rows. a+b and b+a count as one.
    """
    numbers = sorted((story.first, story.second))
    bucket = zlib.crc32(f"{numbers[0]} {numbers[1]} {story.verb in GAINS}".encode()) % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows of `tiny_math`, without repeats; a longer list begins with the shorter one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; tiny_math has {', '.join(SPLITS)}")
    if count > MOST_ROWS:
        raise ValueError(f"{count} rows are too many to draw; at most {MOST_ROWS} can be")
    return [{"question": question, "answer": answer} for question, answer in _drawn(split, count, seed)]


@lru_cache(maxsize=8)  # trials that differ in how many of them they train on need the same
def _drawn(split: str, count: int, seed: int) -> tuple[tuple[str, str], ...]:
    rng = random.Random(f"tiny_math {split} {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        story = draw_story(rng)
        if split_of(story) == split:
            equation = story.equation
            found[f"{story.text} How many {story.thing} now?"] = f"{equation} #{equation.split('=')[1]}"
    return tuple(found.items())


def direction_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """The same stories with the class of what happened in them: more or less."""
    found = []
    for row in rows(split, count, seed):
        story = row["question"].partition(" How many")[0]
        found.append({"story": story, "direction": "more" if "+" in row["answer"] else "less"})
    return found


# What may follow a story in pretraining. The first part is the prompt, the second what the model should say.
# Sums and differences are requested by name, for any story: the model learns the sign of a change and how to
# calculate, but not to combine the two.
PROBES: dict[str, Callable[[Story], tuple[str, str]]] = {
    "first": lambda s: (f"How many {s.thing} at first?", f"{s.first}"),
    "change": lambda s: ("What change?", s.change),
    "who": lambda s: ("Who?", s.name),
    "what": lambda s: ("What?", s.thing),
    "direction": lambda s: ("More or less?", "more" if s.verb in GAINS else "less"),
    "numbers": lambda s: ("Which numbers?", f"{s.first},{s.change}"),
    "sum": lambda s: ("Sum?", add(s.first, s.second)),
    "difference": lambda s: ("Difference?", subtract(s.first, s.second)),
}
PROBE_WEIGHTS = (2, 2, 1, 1, 2, 3, 4, 4)


def equation_lines(rng: random.Random) -> str:
    """A few equations, and sometimes a number written twice: the only place where '#' occurs."""
    lines = []
    for _ in range(4):
        first, second = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
        total = first + second
        lines.append(rng.choice((add(first, second), subtract(first, second), f"{total} #{total}")))
    return "\n".join(lines)


def pretraining_text(rng: random.Random) -> str:
    """One pretraining document: half are equations, half a story with or without a probe."""
    if rng.random() < 0.5:
        return equation_lines(rng)
    story = draw_story(rng)
    text = story.text
    if rng.random() < 0.2:  # the task's question says "now": the word, at least, should not be news
        text = text.replace(f" {story.verb} ", f" now {story.verb} ")
    if rng.random() < 0.1:
        return text
    if rng.random() < 0.1:  # an equation beside a story, about other numbers
        return f"{text}\n{equation_lines(rng).splitlines()[0]}"
    (probe,) = rng.choices(list(PROBES.values()), PROBE_WEIGHTS)
    prompt, answer = probe(story)
    return f"{text} {prompt}\n{answer}"
