"""Predicted training seconds against measured ones: 30 configurations, each predicted and then run.

    python benchmarks/time_prediction.py                      # small models, on this machine
    python benchmarks/time_prediction.py --scale large        # the same configurations on 1B, for a GPU

Prints a line a configuration as it goes. A training takes at least ``--seconds``: the speed of a shared machine varies
from second to second, and a trial that people wait for takes longer than one such change. On a shared CPU
``--cpu-seconds`` takes the clock of the process in place of the wall's, for predictions and for steps, with one thread:
what others do then disturbs less. Each configuration is measured twice; the second time is also predicted from the
first, as a record of the same shape would predict it. What the two differ by is the noise of the machine:
`the_same_by_chance` is what they would differ by if each step only had the spread that it has, and no record predicts
better than that.
A shared machine's speed changes between a prediction and the run: reference products are timed beside both, and the
prediction is that of the machine as it was while it ran; ``error_as_foreseen`` is that of the prediction as it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from peftsweep import cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.compose import trial as make_trial
from peftsweep.data.tokens import Tokens
from peftsweep.forecast import duration, speed
from peftsweep.forecast.duration import SPREADS, Span
from peftsweep.models import model, parts, probe
from peftsweep.observe import measure
from peftsweep.study import record
from peftsweep.training import loop

STEPS = 11  # the fewest; the first three are left out
MEDIAN_OF_NORMAL = 0.6745  # half of a normal distribution is nearer to its mean than so many standard deviations
TINY = "model=tiny"
LLAMA = "model=llama3.2_1b model.init=random"
GPT_NEO = "model=gpt_neo_1.3b model.init=random"
BERT = "model=distilbert model.init=random dataset=sst2"


def llama(width: int, layers: int, vocabulary: int = 8000) -> str:
    """A random Llama of this width and depth."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width, "head_dim": 64}
    heads = {"num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    return " ".join([LLAMA, *(f"model.architecture.{key}={value}" for key, value in (sizes | heads).items())])


SMALL, MIDDLE, LARGE = llama(256, 4), llama(512, 6), llama(576, 30, 49152)  # 8M, 33M, 150M parameters
NEO = f"{GPT_NEO} model.architecture.vocab_size=8000 model.architecture.hidden_size=512 " + " ".join(
    f"model.architecture.{key}={value}"
    for key, value in {"num_layers": 2, "num_heads": 8, "attention_types": "[[[global,local],1]]"}.items()
)
SMALL_BERT = f"{BERT} " + " ".join(
    f"model.architecture.{key}={value}"
    for key, value in {"vocab_size": 8000, "dim": 384, "hidden_dim": 1536, "n_layers": 4, "n_heads": 6}.items()
)
# Model, words, rows a micro-batch, tokens of the longest row.
POINTS: list[tuple[str, str, int, int]] = [
    (TINY, "method=lora", 16, 48),
    (TINY, "method=lora method.r=64 quant=4bit", 16, 48),
    (TINY, "method=full", 4, 96),
    (TINY, "method=ia3 quant=8bit", 8, 32),
    (SMALL, "method=lora method.r=4", 4, 64),
    (SMALL, "method=lora method.r=32 targets=qv", 8, 128),
    (SMALL, "method=lora quant=4bit", 4, 128),
    (SMALL, "method=lora quant=8bit", 4, 128),
    (SMALL, "method=lora model.dtype=bfloat16", 4, 128),
    (SMALL, "method=lora model.dtype=bfloat16 quant=4bit", 8, 64),
    (SMALL, "method=lora train.autocast=bfloat16", 4, 128),
    (SMALL, "method=lora train.checkpointing=true", 4, 128),
    (SMALL, "method=dora", 4, 64),
    (SMALL, "method=dora quant=4bit targets=qv", 4, 128),
    (SMALL, "method=ia3", 8, 64),
    (SMALL, "method=hira", 4, 64),
    (SMALL, "method=prompt_tuning", 4, 96),
    (SMALL, "method=full", 4, 128),
    (SMALL, "method=full train.optimizer=SGD train.checkpointing=true", 4, 64),
    (SMALL, "method=lora train.accumulation=2 method.lora_dropout=0.1", 2, 128),
    (SMALL, "method=lora model.attn_implementation=eager", 4, 128),
    (MIDDLE, "method=lora", 4, 64),
    (MIDDLE, "method=lora quant=4bit method.r=16", 2, 128),
    (MIDDLE, "method=lora model.dtype=bfloat16 train.checkpointing=true", 4, 64),
    (MIDDLE, "method=full model.dtype=bfloat16", 2, 64),
    (NEO, "method=lora", 4, 64),
    (SMALL_BERT, "method=lora targets=qv", 8, 64),
    (SMALL_BERT, "method=full", 4, 64),
    (LARGE, "method=lora method.r=8", 2, 48),
    (LARGE, "method=lora targets=qv quant=4bit", 1, 64),
]


def compose(point: tuple[str, str, int, int], scale: str, steps: int) -> Trial:
    """The trial of a point of the list; at the large scale with the preset's own sizes, eight times the tokens."""
    base, words, rows, _ = point
    if scale == "large":
        base = " ".join(word for word in base.split() if "architecture" not in word)
    overrides = [*base.split(), *words.split(), f"train.batch_size={rows}", f"train.steps={steps}", "quiet=true"]
    overrides += [] if "model.dtype" in words or scale == "large" else ["model.dtype=float32"]
    cfg = cli.compose(overrides)
    return make_trial(cfg, cfg.hydra.runtime.choices, overrides)


def rows(trial: Trial, length: int) -> list[Tokens]:
    """Rows of the same lengths for each step, from a half of ``length`` on, answers a third of each."""
    classes, config = len(trial.config.dataset.classes), trial.config.train
    count = config.steps * config.batch_size * config.accumulation
    lengths = [length // 2 + (n * length // 2) // max(count - 1, 1) for n in range(count)]
    made = [([3 + (n * own) % 400 for n in range(own)], own) for own in lengths]
    return [Tokens(ids, own, 0) if classes else Tokens(ids, own - own // 3) for ids, own in made]


def measured(trial: Trial, tokens: list[Tokens], device: torch.device, clock: Callable[[], float]) -> list[float]:
    """Seconds of the steps of the training but for the first."""
    config = trial.config
    base = model.load(config.model, build.quantization(trial), device, len(config.dataset.classes))
    if parts.classifies(base):
        base.config.pad_token_id = 0
    else:
        probe.abilities(base)
    torch.manual_seed(0)
    adapted = build.attach_method(trial, base, config.train.steps)
    with patch.object(loop, "Laps", partial(measure.Laps, clock=clock)):
        options: dict[str, Any] = {"pad_id": 0, "seed": config.seed, "log": lambda row: None}
        found = loop.train(adapted, tokens, config.train, meter=measure.Meter(device), **options)
    return list(found.steady_seconds)


def by_chance(first: list[float], second: list[float]) -> float:
    """By what share the means of two runs are expected to differ in one case of two, if only each step's seconds vary.

    Steps have rows of other lengths, the same ones in both runs: what varies is the difference of the two of a pair.
    """
    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    return MEDIAN_OF_NORMAL * statistics.stdev(logs) / math.sqrt(len(logs))


def busy(device: speed.Device) -> float:
    """Times as slow as when the device was measured."""
    device.take_kept()
    return device.busy


def compare(
    point: tuple[str, str, int, int], scale: str, device: speed.Device, clock: Callable[[], float], least: float
) -> dict[str, Any]:
    """One line of the result; a run trains for at least ``least`` seconds by the prediction."""
    length = point[3] * (8 if scale == "large" else 1)
    trial = compose(point, scale, STEPS)
    tokens = rows(trial, length)
    begun, cpu = time.perf_counter(), time.process_time()
    device.take_kept()
    found = duration.estimate(trial, device, None, tokens, judged=False)
    took, used = time.perf_counter() - begun, time.process_time() - cpu
    if (short := found.spans.get("train")) and short.seconds < least:
        trial = compose(point, scale, math.ceil(STEPS * least / short.seconds))
        tokens = rows(trial, length)
        found = duration.estimate(trial, device, None, tokens, judged=False)
    span, then, seen = found.spans.get("train"), device.busy, list[float]()

    def run() -> list[float]:
        before = busy(device)
        steps = measured(trial, tokens, device.device, clock)
        seen.append(math.sqrt(before * busy(device)))
        return steps

    runs = run(), run()
    first, second = (statistics.fmean(steps) * trial.config.train.steps for steps in runs)
    truth, now = math.sqrt(first * second), math.sqrt(seen[0] * seen[1])
    sizes = trial.config.model.architecture
    name = (
        f"{trial.choices['model']} {sizes.get('hidden_size', sizes.get('dim', ''))} {point[1]}, {point[2]} x {point[3]}"
    )
    line: dict[str, Any] = {
        "point": name,
        "model": point[0],
        "measured": truth,
        "measured_first": first,
        "measured_second": second,
    }
    line |= {"seconds": took, "cpu_seconds": used}
    # Of the same trial run twice: what a prediction from its record is off by, and how much of that is noise.
    line |= {"again": first / second - 1, "again_at_one_speed": first / seen[0] / (second / seen[1]) - 1}
    line |= {"again_by_chance": by_chance(*runs)}
    if span is None:
        return line | {"predicted": None, "why": found.why}
    slowed = span.times(now / then)
    line |= {"predicted": slowed.seconds, "low": slowed.low, "high": slowed.high, "flops": found.flops}
    line |= {"error": slowed.seconds / truth - 1, "error_as_foreseen": span.seconds / truth - 1}
    return line | {"busy": now, "busy_when_predicted": then}


def in_short(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors by the speed alone; with the ratios of the other points, as records correct; from the same shape."""
    known = [line for line in lines if line.get("error") is not None]
    ratios = [math.log(line["measured"] / line["predicted"]) for line in known]
    corrected, held = [], 0
    for number, line in enumerate(known):
        others = ratios[:number] + ratios[number + 1 :]
        factor = math.exp(statistics.median(others)) if others else 1.0
        corrected.append(abs(line["predicted"] * factor / line["measured"] - 1))
        span = Span.around(line["predicted"], SPREADS["train"])
        held += span.low <= line["measured"] <= span.high
    errors = [abs(line["error"]) for line in known]
    models = list(itertools.accumulate(lines, lambda seen, line: seen | {line["model"]}, initial=set[str]()))
    later = [line for line, seen in zip(lines, models, strict=False) if line["model"] in seen]
    return {
        "n": len(lines),
        "not_predicted": len(lines) - len(known),
        "median_error": statistics.median(errors),
        "median_error_as_foreseen": statistics.median(abs(line["error_as_foreseen"]) for line in known),
        "worst_error": max(errors),
        "coverage": held / len(known),
        "median_error_with_records": statistics.median(corrected),
        "worst_error_with_records": max(corrected),
        # From a record of the same shape; then what of that the machine's speed, as it was beside both, does not say,
        # and what the steps of one run differ by without any cause: no prediction can be nearer.
        "median_error_of_the_same_shape": statistics.median(abs(line["again"]) for line in lines),
        "the_same_at_one_speed_of_the_machine": statistics.median(abs(line["again_at_one_speed"]) for line in lines),
        "the_same_by_chance": statistics.median(line["again_by_chance"] for line in lines),
        "slowest_prediction_seconds": max(line["seconds"] for line in lines),
        "slowest_prediction_cpu_seconds": max(line["cpu_seconds"] for line in lines),
        "slowest_after_the_first_of_its_model_seconds": max((line["seconds"] for line in later), default=None),
        "slowest_after_the_first_of_its_model_cpu_seconds": max((line["cpu_seconds"] for line in later), default=None),
    }


def main() -> None:
    """Compare all points, print a line each and the errors in short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["small", "large"], default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-seconds", action="store_true", help="the process's clock and one thread")
    parser.add_argument("--seconds", type=float, default=8.0, help="the shortest training by its prediction")
    parser.add_argument("--only", default="", help="points that contain this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.cpu_seconds:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        device = speed.Device(model.device(options.device), clock, Path(folder))
        begun, load = time.perf_counter(), os.getloadavg()[0]
        found = device.speed
        print(f"probe: {time.perf_counter() - begun:.1f} s, busy {device.busy:.2f}, load {load:.1f}", flush=True)
        for point in POINTS:
            if options.only not in " ".join(point[:2]):
                continue
            lines.append(line := compare(point, options.scale, device, clock, options.seconds))
            if line["predicted"] is None:
                print(f"{line['point']:75s} not predicted: {line['why']}", flush=True)
                continue
            seconds = f"{line['predicted']:8.2f} s, measured {line['measured']:8.2f} s {line['error']:+7.1%}"
            again = f"the same trial again differs by {line['again']:+6.1%}, by chance {line['again_by_chance']:.1%}"
            print(
                f"{line['point']:75s} {seconds}; {again}; predicted in {line['cpu_seconds']:.1f} s of CPU", flush=True
            )
    short = in_short(lines)
    print(json.dumps(short, indent=1))
    print(
        f"the same trial again differs by {short['median_error_of_the_same_shape']:.1%}, of which "
        f"{short['the_same_by_chance']:.1%} is chance between steps and "
        f"{short['the_same_at_one_speed_of_the_machine']:.1%} is left where the machine's speed is allowed for"
    )
    if options.out:
        facts = {
            "device": device.device.type,
            "name": speed.name_of(device.device),
            "threads": torch.get_num_threads(),
            "clock": "process" if options.cpu_seconds else "wall",
            "load_average": [load, os.getloadavg()[0]],
            "scale": options.scale,
            "versions": record.packages(),
            "speed": {key: value for key, value in vars(found).items() if key != "operations"},
        }
        options.out.write_text(json.dumps(record.plain(facts | short | {"points": lines}), indent=1) + "\n")


if __name__ == "__main__":
    main()
