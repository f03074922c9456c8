"""How fast is the training loop beside a bare torch loop over the same batches?

    python benchmarks/loop_overhead.py [--pairs 240] [--out FILE]

Both loops train their own copy of the same LoRA adapter (r=8, all linear layers, 4-bit base) and take their
steps in turn, so that whatever else the machine does hits both. The bare loop is what one would write for
one configuration by hand: forward, cross-entropy on the answer tokens, backward, clip, fused AdamW,
schedule. The figure is the median of the ratios bare / ours of neighbouring steps, which is our
tokens/s as a share of the bare loop's, with a bootstrap interval of 95%. `measuring` is the ratio of our
own steps with their clock, meter and sums to those without.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, get_scheduler

from peftsweep.data import batches as data_batches
from peftsweep.data import templates, tokens
from peftsweep.models import attach, model
from peftsweep.observe.measure import Laps, Meter
from peftsweep.schema import ModelConfig, TargetsConfig, TrainConfig
from peftsweep.tiny import task
from peftsweep.training import loop, run

TINY = ModelConfig(name_or_path="tiny")
CPU = torch.device("cpu")
WARMUP = 20


def adapted() -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
    )
    torch.manual_seed(0)
    base = model.load(TINY, quantization, CPU)
    return attach.attach(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), TargetsConfig(), {})


def bare_steps(rows: list[tokens.Tokens], config: TrainConfig) -> Iterator[float]:
    """A hand-written loop; yields the seconds of each step."""
    trained = adapted().train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("cosine", optimizer, round(config.warmup * config.steps), config.steps)
    order = data_batches.batch_order([len(row.ids) for row in rows], config.batch_size, 0)
    for numbers in order:
        start = time.perf_counter()
        batch = data_batches.collate([rows[n] for n in numbers], 0)
        logits = trained(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][batch.answer_mask], batch.input_ids[:, 1:][batch.answer_mask]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield time.perf_counter() - start


class Turns(Laps):
    """Our loop's own clock, which lets the bare loop take its step between two of ours."""

    ours: list[float]

    def __init__(self, bare: Iterator[float], bare_seconds: list[float]) -> None:
        super().__init__(CPU)
        self._bare, self._bare_seconds = bare, bare_seconds
        self._mark = time.perf_counter()
        self.ours = []

    def start(self) -> None:
        """Ours is timed from the end of the bare step to the beginning of the next: all that the loop does."""
        now = time.perf_counter()
        self.ours.append(now - self._mark)
        self._bare_seconds.append(next(self._bare))
        self._mark = time.perf_counter()
        super().start()


def measure(pairs: int) -> dict[str, Any]:
    """Interleave the two loops for ``pairs`` steps each."""
    rows = tokens.tokenize(
        model.load_tokenizer(TINY), templates.examples(task.rows("train", 2000), "{question} ", "{answer}"), 128
    )
    config = TrainConfig(steps=WARMUP + pairs + 1, learning_rate=4e-3)
    bare_seconds: list[float] = []
    turns = Turns(bare_steps(rows, config), bare_seconds)
    loop.Laps = lambda device: turns  # type: ignore[attr-defined,assignment,misc]
    loop.train(adapted(), rows, config, pad_id=0, seed=0, meter=Meter(CPU), log=lambda row: None)
    # ours[n + 1] is the step that followed the bare step n; both took the same batch.
    ours = turns.ours[1 + WARMUP :][:pairs]
    ratios = [b / o for b, o in zip(bare_seconds[WARMUP:], ours, strict=False)]
    low, high = bootstrap(ratios)
    return {
        "pairs": len(ratios),
        "tokens_per_second_ratio": statistics.median(ratios),
        "interval_95": [low, high],
        "bare_step_ms": 1000 * statistics.median(bare_seconds[WARMUP:]),
        "our_step_ms": 1000 * statistics.median(ours),
    }


class EverySecond(Laps):
    """Our loop's own clock, meter and sums at every second step only; times all steps from outside."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.gaps: list[float] = []  # from the beginning of one step to that of the next; the first is measured
        self.on = False
        self._mark = 0.0

    def start(self) -> None:
        now = time.perf_counter()
        if self._mark:
            self.gaps.append(now - self._mark)
        self._mark, self.on = now, not self.on
        if self.on:
            super().start()

    def stop(self, without: float = 0.0) -> None:
        if self.on:
            super().stop(without)


def measure_the_measuring(pairs: int) -> dict[str, Any]:
    """What the clock and the sums cost: our steps with and without them, in turns, all on like batches."""
    steps = 2 * (WARMUP + pairs) + 1
    examples = templates.examples(task.rows("train", 1), "{question} ", "{answer}")
    rows = tokens.tokenize(model.load_tokenizer(TINY), examples, 128) * 16 * (steps + 1)
    laps = EverySecond()

    class Sums(run.Epoch):
        def add(self, loss: torch.Tensor, batches: Any) -> None:
            if laps.on:
                super().add(loss, batches)

    class Sampler(Meter):
        def sample(self) -> None:
            if laps.on:
                super().sample()

    config = TrainConfig(steps=steps, learning_rate=4e-3, log_every=steps)
    loop.Laps = lambda device: laps  # type: ignore[attr-defined,assignment,misc]
    run.Epoch = Sums  # type: ignore[misc]
    meter = Sampler(CPU)
    with meter.stage("train"):
        loop.train(adapted(), rows, config, pad_id=0, seed=0, meter=meter, log=lambda row: None)
    measured, bare = laps.gaps[2 * WARMUP :: 2], laps.gaps[2 * WARMUP + 1 :: 2]
    ratios = [m / b for m, b in zip(measured, bare, strict=True)]
    low, high = bootstrap(ratios)
    return {"pairs": len(ratios), "step_time_ratio": statistics.median(ratios), "interval_95": [low, high]}


def bootstrap(values: list[float]) -> tuple[float, float]:
    """The 95% interval of the median, by resampling."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-50]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    assert threading.active_count() == 1
    found = {
        "benchmark": "loop_overhead",
        "command": f"python benchmarks/loop_overhead.py --pairs {options.pairs}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **measure(options.pairs),
        "measuring": measure_the_measuring(options.pairs),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
