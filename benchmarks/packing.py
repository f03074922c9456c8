"""How much sooner are eight LoRA trials done when they are trained together on one base?

    python benchmarks/packing.py [--scale large|small] [--rounds 2] [--minutes 8] [--sides SIDES] [--out FILE]

Three ways to train the same eight adapters (ranks, rates and targets differ) in one warm process, on the same rows:
together (packed.train_packed), one by one (train.train), and PEFT's plain loop, in which every adapter is made
the active one in turn and takes its step. Each round runs all three; their order changes from round to round. A
side's seconds are those of attaching and of all steps; the ratio of `steps` compares the median steps alone, without
what capturing took. With `--capture off,auto` steps are captured as CUDA graphs on no side, and then on both. `probe`
is what pack=auto would find, and `auto` how fast the steps of its choice are beside those of the better one.
`ratio_evaluated` is how many times as fast the eight write answers to the same questions at once as one after the
other; `--sides together,one_by_one` leaves out that and PEFT's loop.

`large` is a Llama of 1B parameters with random weights in bfloat16, 512 tokens a row, for a CUDA device; `small`
is the embedded model with 64 tokens a row. No new setting begins when ``minutes`` are over.

`--arithmetic` compares instead three ways to take the matrix products of a step on a CPU: adapters each by itself, as
a pack does; adapters in one batch; and the base's product for each slot too, which would make a slot's numbers
independent of the others on every CPU. The figures are CPU seconds beside the first, so other work does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from peftsweep import cli
from peftsweep.config import build
from peftsweep.config.compose import trial as make_trial
from peftsweep.data import templates
from peftsweep.data import tokens as data_tokens
from peftsweep.evaluation import evaluate
from peftsweep.evaluation.inference import bare
from peftsweep.models import attach, losses, model
from peftsweep.observe.measure import Meter, synchronise
from peftsweep.schema import Capture, TargetsConfig, TrainConfig
from peftsweep.study import record
from peftsweep.tiny import task
from peftsweep.training import loop, packed, slots
from peftsweep.training import optimizer as training_optimizer

SCALES: dict[str, dict[str, Any]] = {
    "large": {
        "words": ["model=llama3.2_1b", "model.init=random", "model.dtype=bfloat16"],
        "tokens": 512,
        "batches": (1, 2, 4, 8),
        "steps": 10,
    },
    "small": {"words": ["model=tiny"], "tokens": 64, "batches": (1, 4, 16), "steps": 24},
}
SLOTS = 8
CAPTURE = [Capture.off]  # as the command says
COMPARED = ["together", "one_by_one", "plain_loop"]  # as the command says
QV = ["q_proj", "v_proj"]
ALL = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def method(slot: int) -> LoraConfig:
    return LoraConfig(r=(8, 16, 32, 64)[slot % 4], lora_alpha=16, target_modules=list(ALL if slot < 6 else QV))


def config(slot: int, batch: int, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=batch, learning_rate=1e-4 * (1 + slot), log_every=steps, capture=CAPTURE[0]
    )


def fresh(base: Any) -> Any:
    """The base's modules anew, over the same weights."""
    return bare(base)


def rows_of(tokens: int, vocabulary: int) -> list[data_tokens.Tokens]:
    chance = random.Random(0)
    return [
        data_tokens.Tokens([chance.randrange(3, vocabulary) for _ in range(tokens)], tokens // 2) for _ in range(64)
    ]


def together(base: Any, rows: list[data_tokens.Tokens], batch: int, steps: int, meter: Meter) -> float:
    names = [f"slot{slot}" for slot in range(SLOTS)]
    adapted = attach.attach_slots(fresh(base), {n: (method(i), TargetsConfig()) for i, n in enumerate(names)}, 0, {})
    sides = [packed.Slot(n, config(i, batch, steps), lambda row: None) for i, n in enumerate(names)]
    ended = packed.train_packed(adapted, rows, sides, pad_id=0, seed=0, meter=meter)
    return statistics.median(ended[names[0]].trained.step_seconds[-steps // 2 :])


def one_by_one(base: Any, rows: list[data_tokens.Tokens], batch: int, steps: int, meter: Meter) -> float:
    total = 0.0
    for slot in range(SLOTS):
        torch.manual_seed(0)
        adapted = attach.attach(fresh(base), method(slot), TargetsConfig(), {})
        done = loop.train(
            adapted, rows, config(slot, batch, steps), pad_id=0, seed=0, meter=meter, log=lambda row: None
        )
        total += statistics.median(done.step_seconds[-steps // 2 :])
    return total


def plain_loop(base: Any, rows: list[data_tokens.Tokens], batch: int, steps: int, meter: Meter) -> float:
    names = [f"slot{slot}" for slot in range(SLOTS)]
    adapted = attach.attach_slots(fresh(base), {n: (method(i), TargetsConfig()) for i, n in enumerate(names)}, 0, {})
    adapted.train()
    sides = []
    for slot, name in enumerate(names):
        weights = [p for key, p in adapted.named_parameters() if f".{name}." in key]
        optimizer = training_optimizer.make_optimizer(adapted, config(slot, batch, steps), weights)
        sides.append(
            (name, weights, optimizer, training_optimizer.make_scheduler(optimizer, config(slot, batch, steps), steps))
        )
    stream = loop.batches(rows, config(0, batch, steps), pad_id=0, seed=0, device=meter.device)
    synchronise(meter.device)
    start = time.perf_counter()
    for _ in range(steps):
        (one,) = next(stream)
        for name, weights, optimizer, scheduler in sides:
            adapted.set_adapter(name)
            losses.answer_losses(adapted, one).mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    synchronise(meter.device)
    return (time.perf_counter() - start) / steps


SIDES: dict[str, Callable[..., float]] = {"together": together, "one_by_one": one_by_one, "plain_loop": plain_loop}


def evaluated(base: Any, tokenizer: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """How long the slots take to answer sixteen questions at once, and each by PEFT's own layers."""
    names = [f"slot{slot}" for slot in range(SLOTS)]
    adapted = attach.attach_slots(fresh(base), {n: (method(i), TargetsConfig()) for i, n in enumerate(names)}, 0, {})
    adapted.eval()
    examples = templates.examples(task.rows("test", 16), "{question} ", "{answer}")
    seconds: dict[str, list[float]] = {"together": [], "one_by_one": []}
    for number in range(rounds + 1):  # the first one warms up
        for side in sorted(seconds, reverse=bool(number % 2)):
            synchronise(base.device)
            start = time.perf_counter()
            together = slots.Pack(adapted, names) if side == "together" else None
            for name in names:
                adapted.set_adapter(name)
                with together.evaluated_together(name) if together else nullcontext():
                    evaluate.generation(adapted, tokenizer, examples, max_new_tokens=tokens // 2)
                    evaluate.perplexity(adapted, tokenizer, examples)
            if together:
                together.close()
            synchronise(base.device)
            seconds[side].append(time.perf_counter() - start)
    found = {side: took[1:] for side, took in seconds.items()}
    ratios = [a / b for a, b in zip(found["one_by_one"], found["together"], strict=True)]
    return {"ratio_evaluated": statistics.median(ratios), "seconds": found}


def timed(side: str, *arguments: Any, meter: Meter) -> tuple[float, float, int | None]:
    """Seconds, those of a step of all slots, and the peak of the memory that was reserved on the device in bytes."""
    on_gpu = meter.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronise(meter.device)
    start = time.perf_counter()
    step = SIDES[side](*arguments, meter)
    synchronise(meter.device)
    return time.perf_counter() - start, step, torch.cuda.max_memory_reserved() if on_gpu else None


def compare(
    base: Any, rows: list[data_tokens.Tokens], batch: int, steps: int, rounds: int, meter: Meter
) -> dict[str, Any]:
    """All sides at one batch size."""
    seconds: dict[str, list[float]] = {side: [] for side in COMPARED}
    of_steps: dict[str, list[float]] = {side: [] for side in COMPARED}
    memory: dict[str, int | None] = {}
    for number in range(rounds + 1):  # the first one warms up, with few steps
        order = [*COMPARED] if number % 2 else [*reversed(COMPARED)]
        for side in order:
            took, step, memory[side] = timed(side, base, rows, batch, steps if number else 2, meter=meter)
            seconds[side].append(took)
            of_steps[side] += [step] if number else []
            print(f"    {side}: {took:.1f} s, {1000 * step:.1f} ms a step", flush=True)
    adapters = {f"slot{slot}": (method(slot), TargetsConfig()) for slot in range(SLOTS)}
    adapted = attach.attach_slots(fresh(base), adapters, 0, {})
    probe = packed.speedup(adapted, [*adapters], rows, config(0, batch, steps), pad_id=0, meter=meter)
    found = {side: took[1:] for side, took in seconds.items()}
    of_steps_alone = min(of_steps["one_by_one"]) / min(of_steps["together"])
    from peftsweep.sweep.pack import MIN_PACK_SPEEDUP

    return {
        "batch_size": batch,
        "steps": steps,
        **{
            f"ratio_to_{side}": statistics.median(a / b for a, b in zip(took, found["together"], strict=True))
            for side, took in found.items()
            if side != "together"
        },
        "ratio_of_steps": of_steps_alone,
        "steps_seconds": {side: min(took) for side, took in of_steps.items()},
        "probe": probe,
        "auto": (of_steps_alone if probe >= MIN_PACK_SPEEDUP else 1.0) / max(of_steps_alone, 1.0),
        "capture": CAPTURE[0].value,
        "seconds": found,
        "device_memory_peak": memory,
    }


def arithmetic(
    base: Any, rows: list[data_tokens.Tokens], batch: int, steps: int, rounds: int, meter: Meter
) -> dict[str, Any]:
    """CPU seconds of a pack's steps in the three ways, and their ratio to the first."""
    seconds: dict[str, list[float]] = {"each_adapter": [], "adapters_in_one_batch": [], "base_for_each_slot": []}
    names = [f"slot{slot}" for slot in range(SLOTS)]
    for number in range(rounds + 1):  # the first one warms up
        for way in sorted(seconds, reverse=bool(number % 2)):
            adapted = attach.attach_slots(
                fresh(base), {n: (method(i), TargetsConfig()) for i, n in enumerate(names)}, 0, {}
            )
            if way == "base_for_each_slot":
                for layer in {m for m in adapted.modules() if isinstance(m, LoraLayer)}:
                    in_parts(layer.get_base_layer())
            sides = [packed.Slot(n, config(i, batch, steps), lambda row: None) for i, n in enumerate(names)]
            with patch.object(packed, "Pack", partial(slots.Pack, stacked=way == "adapters_in_one_batch")):
                start = time.process_time()
                packed.train_packed(adapted, rows, sides, pad_id=0, seed=0, meter=meter)
            seconds[way].append(time.process_time() - start)
    found = {way: took[1:] for way, took in seconds.items()}
    ratios = {
        way: statistics.median(a / b for a, b in zip(took, found["each_adapter"], strict=True))
        for way, took in found.items()
    }
    return {"batch_size": batch, "steps": steps, "ratio": ratios, "seconds": found}


def in_parts(module: torch.nn.Module) -> None:
    """Have the module multiply the rows of each slot by themselves."""
    forward = module.forward
    module.forward = lambda x: torch.cat([forward(part) for part in x.chunk(SLOTS)])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--scale", choices=SCALES, default="large" if torch.cuda.is_available() else "small")
    words.add_argument("--rounds", type=int, default=2)
    words.add_argument("--minutes", type=float, default=8)
    words.add_argument("--arithmetic", action="store_true")
    words.add_argument("--capture", default="off", help="off, auto, or both with a comma between them")
    words.add_argument("--batches", help="batch sizes in place of the scale's, with commas between them")
    words.add_argument("--steps", type=int, help="steps of a trial in place of the scale's")
    words.add_argument("--quants", default="none,4bit")
    words.add_argument("--sides", default=",".join(COMPARED))
    words.add_argument("--model", help="words of the model in place of the scale's")
    words.add_argument("--out", type=Path)
    args = words.parse_args()
    scale, begun = dict(SCALES[args.scale]), time.monotonic()
    scale |= {"steps": args.steps} if args.steps else {}
    scale |= {"batches": [*map(int, args.batches.split(","))]} if args.batches else {}
    scale |= {"words": args.model.split()} if args.model else {}
    meter, COMPARED[:] = Meter(model.device("auto")), args.sides.split(",")
    settings, answers = [], {}
    for quant in args.quants.split(","):
        told = [*scale["words"], f"quant={quant}"]
        cfg = cli.compose(told)
        one = make_trial(cfg, cfg.hydra.runtime.choices, told)
        tokenizer = model.load_tokenizer(one.config.model)
        base = build.load_base(one, tokenizer, meter.device)
        rows = rows_of(scale["tokens"], min(base.config.vocab_size, 500))
        for batch, way in itertools.product(scale["batches"], map(Capture, args.capture.split(","))):
            CAPTURE[:] = [way]
            if time.monotonic() - begun > 60 * args.minutes:
                continue
            if args.arithmetic:
                found = {"quant": quant} | arithmetic(base, rows, batch, scale["steps"] // 3, args.rounds, meter)
                settings.append(found)
                print(f"{quant:5} batch {batch:2}: {found['ratio']}", flush=True)
                continue
            found = {"quant": quant} | compare(base, rows, batch, scale["steps"], args.rounds, meter)
            settings.append(found)
            print(
                f"{quant:5} batch {batch:2} capture {way.value}: {found['ratio_to_one_by_one']:.2f} x one by one "
                f"(steps alone {found['ratio_of_steps']:.2f}), "
                f"{found.get('ratio_to_plain_loop', math.nan):.2f} x PEFT's loop, probe {found['probe']:.2f}, "
                f"auto {found['auto']:.2f}",
                flush=True,
            )
        if args.arithmetic or "plain_loop" not in COMPARED:
            continue
        if time.monotonic() - begun > 60 * args.minutes:
            continue
        answers[quant] = evaluated(base, tokenizer, scale["tokens"], args.rounds)
        print(f"{quant:5} evaluated: {answers[quant]['ratio_evaluated']:.2f} x one by one", flush=True)
        del base
    content = {"scale": args.scale, "slots": SLOTS, "tokens": scale["tokens"], "settings": settings}
    content |= {"evaluations": answers, "load": os.getloadavg()}
    if args.out:
        record.write_json(args.out, content | {"environment": record.environment()})
    else:
        print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
