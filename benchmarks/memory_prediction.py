"""How far is the predicted training peak from the measured one?

    python benchmarks/memory_prediction.py [--scale small|large] [--device auto] [--only WORDS] [--out FILE]
    python benchmarks/memory_prediction.py --packs [--scale small|large] [--device auto] [--out FILE]

Thirty configurations of random models are trained for a few steps; with --packs, sets of LoRA trials together. On
a GPU the truth is the peak of torch's allocator (``max_memory_allocated``). On a CPU it is what the allocator was
asked for, block by block, as torch.profiler reports it, which unlike the resident set is free of noise and of other
libraries; the growth of the resident set is given beside it. The error is predicted / measured - 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from peftsweep import cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.compose import trial as make_trial
from peftsweep.data.tokens import Tokens
from peftsweep.forecast import forecast, predict
from peftsweep.models import model, parts, probe
from peftsweep.observe.measure import Meter
from peftsweep.training import loop, packed

STEPS = 3  # the optimizer's state is there from the second on
LLAMA = "model=llama3.2_1b model.init=random"
GPT_NEO = "model=gpt_neo_1.3b model.init=random"
OPT = "model=opt_350m model.init=random"
PHI = "model=phi2 model.init=random"
BERT = "model=distilbert model.init=random dataset=sst2"

# Of each architecture the sizes for a CPU; `--scale large` takes the presets as they are.
SMALL: dict[str, dict[str, Any]] = {
    LLAMA: {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "head_dim": 64}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    GPT_NEO: {"vocab_size": 8000, "hidden_size": 512, "num_layers": 2, "num_heads": 8}
    | {"attention_types": [[["global", "local"], 1]]},
    OPT: {"vocab_size": 16000, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048}
    | {"num_hidden_layers": 2, "num_attention_heads": 8},
    PHI: {"vocab_size": 8000, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "num_key_value_heads": 8},
    BERT: {"vocab_size": 8000, "dim": 512, "hidden_dim": 2048, "n_layers": 3, "n_heads": 8},
}

POINTS = [
    (LLAMA, "method=lora"),
    (LLAMA, "method=lora quant=4bit"),
    (LLAMA, "method=lora quant=8bit"),
    (LLAMA, "method=lora train.checkpointing=true"),
    (LLAMA, "method=lora quant=4bit train.checkpointing=true"),
    (LLAMA, "method=lora targets=all_linear method.lora_dropout=0.1"),
    (LLAMA, "method=lora targets=all_linear quant=4bit method.r=64"),
    (LLAMA, "method=lora model.attn_implementation=eager"),
    (LLAMA, "method=lora model.dtype=bfloat16"),
    (LLAMA, "method=lora model.dtype=bfloat16 quant=4bit targets=all_linear"),
    (LLAMA, "method=lora model.dtype=bfloat16 quant=8bit"),
    (LLAMA, "method=lora train.autocast=bfloat16"),
    (LLAMA, "method=full train.autocast=bfloat16 train.checkpointing=true"),
    (LLAMA, "method=dora targets=all_linear"),
    (LLAMA, "method=dora quant=4bit"),
    (LLAMA, "method=ia3"),
    (LLAMA, "method=ia3 quant=8bit"),
    (LLAMA, "method=hira"),
    (LLAMA, "method=prompt_tuning"),
    (LLAMA, "method=prompt_tuning quant=4bit train.checkpointing=true"),
    (LLAMA, "method=full"),
    (LLAMA, "method=full train.optimizer=SGD"),
    (LLAMA, "method=full train.checkpointing=true train.accumulation=2"),
    (LLAMA, "method=full train.optimizer=bitsandbytes.optim.AdamW8bit"),
    (GPT_NEO, "method=lora"),
    (GPT_NEO, "method=full train.checkpointing=true"),
    (OPT, "method=lora targets=all_linear quant=4bit"),
    (PHI, "method=lora targets=qv"),
    (BERT, "method=lora targets=qv"),
    (BERT, "method=full"),
]


# Packs, by what their trials share, and what each has of its own.
WIDE = ["method.r=64", "method.r=8 targets=all_linear", "method.r=16 targets=qv", "method.r=8 targets=mlp"]
ALIKE = [f"method.r=8 train.learning_rate={rate}" for rate in ("1e-4", "2e-4")]
PACKS = [
    (LLAMA, "method=lora", ALIKE),
    (LLAMA, "method=lora", WIDE),
    (LLAMA, "method=lora targets=all_linear", 4 * ALIKE),
    (LLAMA, "method=lora quant=4bit", ALIKE),
    (LLAMA, "method=lora quant=4bit", WIDE),
    (LLAMA, "method=lora quant=4bit targets=all_linear method.lora_dropout=0.1", 4 * ALIKE),
    (LLAMA, "method=lora quant=8bit", WIDE),
    (LLAMA, "method=lora quant=4bit train.checkpointing=true", WIDE),
    (LLAMA, "method=lora train.accumulation=2 train.optimizer=SGD", WIDE),
    (LLAMA, "method=lora train.autocast=bfloat16", WIDE),
    (LLAMA, "method=lora model.dtype=bfloat16 quant=4bit", WIDE),
]


def compose(point: tuple[str, str], scale: str) -> Trial:
    """The trial of a point of the list, at that scale."""
    words = [*point[0].split(), *point[1].split(), "train.batch_size=4", f"train.steps={STEPS}", "quiet=true"]
    if scale == "small":
        words += [] if "model.dtype" in point[1] else ["model.dtype=float32"]  # as a CPU is used
        words += [f"model.architecture.{key}={value}".replace(" ", "") for key, value in SMALL[point[0]].items()]
    cfg = cli.compose(words)
    return make_trial(cfg, cfg.hydra.runtime.choices, words)


def rows(trial: Trial, length: int) -> list[Tokens]:
    """Rows of random tokens, answers of a third of their length; every micro-batch holds one of the longest."""
    draw = random.Random(0)
    vocabulary = trial.config.model.architecture["vocab_size"]
    classes = len(trial.config.dataset.classes)
    count = STEPS * trial.config.train.batch_size * trial.config.train.accumulation

    def row(n: int) -> Tokens:
        own = length if n % 2 else draw.randint(length // 2, length)
        ids = [draw.randrange(3, vocabulary) for _ in range(own)]
        return Tokens(ids, own, draw.randrange(classes)) if classes else Tokens(ids, own - length // 3)

    return [row(n) for n in range(count)]


def predicted(trial: Trial, tokens: list[Tokens], device: str) -> predict.Prediction:
    """The prediction, made as a trial makes it."""
    config = trial.config
    base = predict.skeleton(config.model, build.quantization(trial), classes=len(config.dataset.classes))
    with torch.device("meta"):
        adapted = build.attach_method(trial, base, config.train.steps)
    return predict.predict(adapted, config.train, predict.shapes(tokens, config.train, config.seed), device)


def measured(trial: Trial, tokens: list[Tokens], device: torch.device) -> dict[str, int]:
    """Bytes at the peak of a real training: of the allocator, and (on a CPU) of the resident set."""
    config = trial.config

    def prepare() -> tuple[torch.nn.Module, Callable[[Meter], Any]]:
        base = model.load(config.model, build.quantization(trial), device, len(config.dataset.classes))
        if parts.classifies(base):
            base.config.pad_token_id = 0
        else:
            probe.abilities(base)  # as build.load_base does
        torch.manual_seed(0)
        adapted = build.attach_method(trial, base, config.train.steps)
        options: dict[str, Any] = {"pad_id": 0, "seed": config.seed, "log": lambda row: None}
        return adapted, lambda meter: loop.train(adapted, tokens, config.train, meter=meter, **options)

    return peak(prepare, device)


def peak(prepare: Callable[[], tuple[torch.nn.Module, Callable[[Meter], Any]]], device: torch.device) -> dict[str, int]:
    """The bytes at the peak of a training, and of the model that it is given."""
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # which are predicted, and outlive the configuration before
        torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    meter = Meter(device)
    adapted, run = prepare()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        if device.type == "cpu"
        else (meter.stage("warm")) as watch,
        meter.stage("train") as stage,
    ):
        start = _storage_bytes(adapted)
        run(meter)
    if device.type == "cuda":
        return {"measured": int(stage.allocated_peak or 0) - held}
    return {"measured": start + _most(watch), "rss_peak": stage.rss_peak}


def measured_pack(trials: list[Trial], tokens: list[Tokens], device: torch.device) -> dict[str, int]:
    """``measured`` of trials that are trained together."""
    config = trials[0].config
    slots = {f"slot{number}": one for number, one in enumerate(trials)}

    def prepare() -> tuple[torch.nn.Module, Callable[[Meter], Any]]:
        base = model.load(config.model, build.quantization(trials[0]), device)
        probe.abilities(base)
        adapted = build.attach_slots(slots, base)
        sides = [packed.Slot(name, one.config.train, lambda row: None) for name, one in slots.items()]
        return adapted, lambda meter: packed.train_packed(adapted, tokens, sides, pad_id=0, seed=0, meter=meter)

    return peak(prepare, device)


def _storage_bytes(adapted: torch.nn.Module) -> int:
    storages = [tensor.untyped_storage() for _, tensor in predict._named_tensors(adapted)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _most(watch: Any) -> int:
    """The highest sum of the blocks that were asked for and not yet given back, in order of time."""
    events = [event for event in watch.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compare_pack(point: tuple[str, str, list[str]], scale: str, device: torch.device, length: int) -> dict[str, Any]:
    """One line of the result, of a pack."""
    base, shared, own = point
    trials = [compose((base, f"{shared} {words}"), scale) for words in own]
    tokens = rows(trials[0], length)

    def predict_all() -> predict.Prediction:
        prediction = forecast.together(trials, tokens, device.type)
        assert prediction is not None
        return prediction

    name = f"{base.split()[0]} {shared}: {len(own)} slots{' of different targets' if own is WIDE else ''}"
    return line(name, predict_all, partial(measured_pack, trials, tokens, device))


def compare(point: tuple[str, str], scale: str, device: torch.device, length: int) -> dict[str, Any]:
    """One line of the result."""
    trial = compose(point, scale)
    tokens = rows(trial, length)
    name = f"{point[0].split()[0]} {point[1]}"
    return line(name, partial(predicted, trial, tokens, device.type), partial(measured, trial, tokens, device))


def line(name: str, foresee: Callable[[], predict.Prediction], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is foreseen beside what is measured."""
    start = time.perf_counter()
    prediction = foresee()
    seconds = time.perf_counter() - start
    truth = measure()
    error = prediction.peak_bytes / truth["measured"] - 1
    return {"point": name, "predicted": prediction.peak_bytes, **truth, "error": error, "seconds": seconds} | vars(
        prediction
    )


def main() -> None:
    """Compare all points, print a line each and the errors in short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["small", "large"], default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--only", default="", help="points that contain this")
    parser.add_argument("--packs", action="store_true", help="trials together")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = model.device(options.device)
    lines = []
    for point in PACKS if options.packs else POINTS:
        if options.only not in " ".join(point[:2]):
            continue
        find: Callable[..., dict[str, Any]] = compare_pack if options.packs else compare
        line = find(point, options.scale, device, options.length)
        lines.append(line)
        sizes = f"{line['predicted'] / 2**20:9.1f} {line['measured'] / 2**20:9.1f} MiB"
        print(f"{line['point']:75s} {sizes} {line['error']:+7.1%} {line['seconds']:5.1f} s", flush=True)
    errors = [abs(line["error"]) for line in lines]
    short = {"n": len(lines), "median_error": statistics.median(errors), "worst_error": max(errors)}
    print(short)
    if options.out:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        versions = {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")}
        facts = {"device": device.type, "name": name, "versions": versions, "scale": options.scale}
        options.out.write_text(json.dumps(facts | short | {"length": options.length, "points": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
