"""Tokens -> padded batches, in an order that depends on the seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
from peftsweep.data.tokens import Tokens

BUCKET_BATCHES = 20  # batches sorted by length together: little padding, and the order stays random


@dataclass
class Batch:
    """Right-padded tokens.

    Shapes: ``input_ids`` and ``attention_mask`` are [rows, length], of int64. ``answer_mask``
    is [rows, length - 1], bool: whether the token *after* a position belongs to an answer. ``places``
    are the same positions as indices, so that none must be read back from the device: [answer_tokens], of int64, into
    the flattened [rows, length - answer_start] that begins with the position before ``answer_start``.
    ``labels`` are the classes for a classifier, [rows], of int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    places: torch.Tensor
    tokens: int  # without padding
    answer_tokens: int
    answer_start: int  # the first position of any answer in the batch, at least 1
    labels: torch.Tensor | None = None

    @property
    def owners(self) -> torch.Tensor:
        """The row that each predicted answer token (or class) belongs to: [answer_tokens], of int64."""
        if self.labels is not None:
            return self.labels.new_ones(len(self.labels)).cumsum(0) - 1
        return self.places // (self.input_ids.shape[1] - self.answer_start)

    @property
    def targets(self) -> torch.Tensor:
        """The answer tokens, in the order of their places: [answer_tokens], of int64."""
        return self.input_ids[:, self.answer_start :].flatten().index_select(0, self.places)

    def repeated(self, times: int) -> Batch:
        """The batch repeated ``times`` times along the rows."""
        rows, length = self.input_ids.shape
        starts = (self.places.new_ones(times).cumsum(0) - 1) * rows * (length - self.answer_start)
        return replace(
            self,
            input_ids=self.input_ids.repeat(times, 1),
            attention_mask=self.attention_mask.repeat(times, 1),
            answer_mask=self.answer_mask.repeat(times, 1),
            places=(self.places + starts[:, None]).flatten(),
            tokens=self.tokens * times,
            answer_tokens=self.answer_tokens * times,
            labels=None if self.labels is None else self.labels.repeat(times),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; the host does not wait for the copy."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "attention_mask", "answer_mask", "places", "labels")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{n: t.pin_memory().to(device, non_blocking=True) for n, t in tensors.items()})


def collate(rows: Sequence[Tokens], pad_id: int, multiple: int = 1) -> Batch:
    """Pad ``rows`` on the right to the longest of them, or to the next length that ``multiple`` divides."""
    import torch

    length = math.ceil(max(len(row.ids) for row in rows) / multiple) * multiple
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(rows), length), dtype=torch.int64)
    answers = torch.zeros((len(rows), length - 1), dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        attention[n, : len(row.ids)] = 1
        trained = True if row.trained is None else torch.tensor(row.trained[max(row.answer_start, 1) :])
        answers[n, max(row.answer_start, 1) - 1 : len(row.ids) - 1] = trained
    labels = [row.label for row in rows if row.label is not None]
    start = max(min(row.answer_start for row in rows), 1)
    return Batch(
        ids,
        attention,
        answers,
        places=answers[:, start - 1 :].flatten().nonzero()[:, 0],
        tokens=sum(len(row.ids) for row in rows),
        answer_tokens=sum(row.answer_tokens for row in rows),
        answer_start=start,
        labels=torch.tensor(labels) if labels else None,
    )


def batch_order(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers, each epoch shuffled anew, rows of similar length together.

    Buckets of ``BUCKET_BATCHES`` batches are sorted by length and their batches shuffled again, so
    that padding is small and no epoch begins with all short rows. An epoch's last batch may be smaller.
    """
    shuffle = random.Random(seed)
    while True:
        order = shuffle.sample(range(len(lengths)), len(lengths))
        bucket = BUCKET_BATCHES * batch_size
        epoch = []
        for start in range(0, len(order), bucket):
            rows = sorted(order[start : start + bucket], key=lambda n: lengths[n])
            epoch += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        shuffle.shuffle(epoch)
        yield from epoch


def micro_batches(steps: Iterable[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    """The row numbers of each step in micro-batches of ``batch_size``; a step's last one may be smaller.

    The rows of a step do not depend on the number of its micro-batches. ``batch_order`` sorts the rows of a step by
    length, so that micro-batches hold little padding.
    """
    for step in steps:
        yield [step[start : start + batch_size] for start in range(0, len(step), batch_size)]
