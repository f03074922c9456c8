"""How long does a training step take, ours beside others on the same batches?

    python benchmarks/loops.py cpu                  # or gpu, rehearse: settings, each in a process of its own
    python benchmarks/loops.py "model=llama3.2_1b model.init=random model.dtype=bfloat16 method.r=32 targets=qv" \
        --batch 1,4 --tokens 305 --answers 0.65 --sides ours,plain,peft,hand,trainer,sft

Every side trains an adapter of its own kind from the same weights on the same rows, in the same order, on one base; the
sides take turns, ``--rounds`` times, in another order each time. A line is printed as soon as a side was measured, and
no further round begins when ``--minutes`` are over.

| side | what it is |
|---|---|
| ours | train.train with train.capture=off |
| plain | train.train without the shortcuts of shortcuts.py: the logits from the first answer on, a mask |
| masked | train.train with the head's shortcuts and a mask |
| fused | ours, with the layers of training/fused.py, which CUDA has anyway |
| captured | train.train with train.capture=auto, once its graphs are captured |
| peft | the loop of PEFT's method comparison (run.py there): its loss of prompt and answer, its logging |
| hand | what one writes by hand: all logits, loss on the answers, fused AdamW |
| trainer | transformers' Trainer |
| sft | TRL's SFTTrainer, where TRL is installed |

Lengths of rows are log-normal around ``--tokens``, as those of GSM8K; ``--answers`` is the answers' share of them. On a
CPU, which others may use too, a side's time is the sum over the steps of the fastest time that a step took in any
round; on a GPU it is that of the fastest round. The first steps are left out. Memory is the peak on the device. With
``--profile`` each side is run once more under torch.profiler, which counts the kernels of a step and the milliseconds
that the device computes in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import get_cosine_schedule_with_warmup

from peftsweep import cli
from peftsweep.config import build
from peftsweep.config.compose import trial as make_trial
from peftsweep.data import batches
from peftsweep.data.tokens import Tokens
from peftsweep.evaluation.inference import bare
from peftsweep.models import model, parts, probe
from peftsweep.models.shortcuts import SHORTCUTS, Shortcuts
from peftsweep.observe.measure import Meter, synchronise
from peftsweep.schema import Capture
from peftsweep.study import record
from peftsweep.training import capture, loop
from peftsweep.training import fused as training_fused

WARMUP = 4  # steps
CAPTURED_ROUNDS = 5  # times through the batches, until a length was seen often enough to be captured
RATE = 1e-4
CLIP = 1.0
LONGEST = 768

SMALL = "{model_type: llama, vocab_size: 8000, hidden_size: 256, intermediate_size: 1024, num_hidden_layers: 2, "
SMALL += "num_attention_heads: 4, num_key_value_heads: 4, tie_word_embeddings: true}"
SMOL = "{model_type: llama, vocab_size: 49152, hidden_size: 576, intermediate_size: 1536, num_hidden_layers: 30, "
SMOL += "num_attention_heads: 9, num_key_value_heads: 3, tie_word_embeddings: true}"
RANDOM = "model=causal_lm model.name_or_path=random model.init=random"
SMALL_WORDS = f"{RANDOM} model.dtype=float32 '+model.architecture={SMALL}' method=lora method.r=32 targets=qv"
SMOL_WORDS = f"{RANDOM} model.dtype=float32 '+model.architecture={SMOL}' method=lora method.r=8 targets=qv"
ONE_B = "model=llama3.2_1b model.init=random model.dtype=bfloat16 method=lora method.r=32 targets=qv"
THREE_B = ONE_B.replace("1b", "3b")

GPU_OPTIONS = "--tokens 305 --answers 0.65 --rounds 2 --sides ours,captured,peft,hand --profile"

# Words, and options of this command.
SETS: dict[str, list[tuple[str, str]]] = {
    "cpu": [
        *((SMALL_WORDS, f"--batch {batch} --tokens 38 --answers 0.4 --steps 40") for batch in (1, 4, 16)),
        (SMOL_WORDS, "--batch 8 --tokens 46 --answers 0.4 --steps 8 --rounds 2"),
        (SMOL_WORDS, "--batch 8 --tokens 92 --answers 0.1 --steps 8 --rounds 2"),
        (SMOL_WORDS.replace("float32", "bfloat16"), "--batch 8 --tokens 46 --answers 0.4 --steps 8 --rounds 2"),
        ("model=tiny method=lora method.r=8", "--batch 16 --tokens 30 --answers 0.4 --steps 40"),
    ],
    "gpu": [
        (ONE_B, f"--batch 4,1,16 {GPU_OPTIONS}"),
        (f"{ONE_B} quant=4bit", f"--batch 4 {GPU_OPTIONS}"),
        (THREE_B, f"--batch 4 {GPU_OPTIONS}"),
    ],
    "rehearse": [
        (SMALL_WORDS, "--batch 2 --tokens 38 --answers 0.4 --steps 8 --rounds 1 --sides ours,plain,peft,hand")
    ],
}


class Bench:
    """One setting: a base, adapters on it, and the batches that every side takes, made by ``plan_batches``."""

    def __init__(self, words: Sequence[str], args: argparse.Namespace) -> None:
        cfg = cli.compose([*words])
        self.trial = make_trial(cfg, cfg.hydra.runtime.choices, words)
        self.device = model.device(self.trial.config.device)
        begun = time.perf_counter()
        base = model.load(self.trial.config.model, build.quantization(self.trial), self.device)
        probe.abilities(base)
        self.base: Any = base
        self.args, self.steps = args, args.steps
        self.marks: list[float] = []
        self.facts: dict[str, Any] = {}  # of the side that was measured last
        self.meter: Meter | None = None  # of that side, if it is ours
        self.clock = time.process_time if args.cpu_seconds else time.perf_counter
        print(f"loaded in {time.perf_counter() - begun:.1f} s: {getattr(base, SHORTCUTS)}", flush=True)

    def plan_batches(self, batch: int) -> None:
        """Take batches of that many rows from here on."""
        self.batch, vocabulary = batch, int(parts.text_config(self.base).vocab_size)
        self.rows = rows(batch * (self.steps + 2), self.args.tokens, self.args.answers, min(1000, vocabulary))
        order = batches.batch_order([len(row.ids) for row in self.rows], batch, 0)
        self.plan = list(itertools.islice(order, self.steps))

    @property
    def tokens(self) -> int:
        """Those of the steps that are timed, without padding."""
        return sum(len(self.rows[n].ids) for step in self.plan[WARMUP:] for n in step)

    def adapted(self) -> Any:
        torch.manual_seed(0)
        return build.attach_method(self.trial, cast(Any, bare(self.base)), self.steps)

    def tick(self) -> None:
        """A step has ended."""
        if self.device.type == "cpu" or len(self.marks) % self.steps + 1 in (WARMUP, self.steps):
            synchronise(self.device)
        self.marks.append(self.clock())

    def measure(self, side: Callable[[Bench], None]) -> tuple[list[float], float | None]:
        """The seconds of every timed step (on a GPU of all of them together), and the peak in GB."""
        self.marks.clear()
        self.facts, self.meter = {}, None
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        side(self)
        marks = self.marks[-self.steps :][WARMUP - 1 :]  # of a side that goes through the batches often, the last time
        took = [marks[-1] - marks[0]] if on_gpu else [b - a for a, b in itertools.pairwise(marks)]
        if not on_gpu:
            return took, None
        # The product's meter resets the peak in between; what it saw is the whole training's.
        peak = self.meter.stages["train"].allocated_peak if self.meter else torch.cuda.max_memory_allocated()
        self.facts |= {"reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
        return took, (peak or 0) / 1e9


def rows(count: int, tokens: int, answers: float, vocabulary: int) -> list[Tokens]:
    chance = random.Random(0)
    lengths = [min(LONGEST, max(8, round(tokens * chance.lognormvariate(-0.1, 0.45)))) for _ in range(count)]
    return [Tokens([chance.randrange(3, vocabulary) for _ in range(n)], round(n * (1 - answers))) for n in lengths]


# ---- the sides -------------------------------------------------------------------------------------


def ours(bench: Bench, short: Shortcuts | None = None, *, fuse: bool = False, often: int = 1) -> None:
    """``train.train``, ``often`` times through the batches, which are captured if that is more than once."""
    adapted = bench.adapted()
    if short is not None:
        setattr(parts.base_of(adapted), SHORTCUTS, short)
    own = bench.trial.config.train
    steps, order = often * bench.steps, often * bench.plan
    way = Capture.auto if often > 1 else Capture.off
    config = replace(
        own, steps=steps, epochs=None, log_every=10, batch_size=bench.batch, learning_rate=RATE, capture=way
    )
    meter = bench.meter = Meter(bench.device)
    sample = meter.sample

    def sample_and_tick() -> None:
        sample()
        bench.tick()

    with meter.stage("train"), training_fused.fused(adapted) if fuse else nullcontext():
        meter.sample = sample_and_tick  # type: ignore[method-assign]
        try:
            done = loop.train(
                adapted, bench.rows, config, pad_id=0, seed=0, meter=meter, log=lambda _: None, order=order
            )
            bench.facts = done.compilation | {"loss": done.final_loss}
        finally:
            meter.sample = sample  # type: ignore[method-assign]


def fused(bench: Bench) -> None:
    ours(bench, fuse=True)


def captured(bench: Bench) -> None:
    with patch.object(capture.StaticSteps, "_pays_off", lambda *_: True):
        ours(bench, often=CAPTURED_ROUNDS)


def plain(bench: Bench) -> None:
    ours(bench, Shortcuts())


def masked(bench: Bench) -> None:
    ours(bench, replace(getattr(bench.base, SHORTCUTS), no_mask=False))


def padded(bench: Bench, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch as scripts make it; labels are the answers."""
    some = [bench.rows[n] for n in numbers]
    longest = max(len(row.ids) for row in some)
    fill = [longest - len(row.ids) for row in some]
    return {
        "input_ids": torch.tensor([row.ids + [0] * n for row, n in zip(some, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * n for row, n in zip(some, fill, strict=True)]),
        "labels": torch.tensor(
            [
                [-100] * row.answer_start + row.ids[row.answer_start :] + [-100] * n
                for row, n in zip(some, fill, strict=True)
            ]
        ),
    }


def peft(bench: Bench) -> None:
    adapted = bench.adapted().train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, bench.steps)
    for numbers in bench.plan:
        batch = {name: tensor.to(bench.device) for name, tensor in padded(bench, numbers).items()}
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        loss = adapted(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        loss.item()
        if bench.device.type == "cuda":
            torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        bench.tick()


def hand(bench: Bench) -> None:
    adapted = bench.adapted().train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, bench.steps)
    for numbers in bench.plan:
        batch = {name: tensor.to(bench.device) for name, tensor in padded(bench, numbers).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = adapted(**batch, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bench.tick()


def trainer(bench: Bench) -> None:
    import transformers

    _with_trainer(bench, transformers.Trainer, transformers.TrainingArguments)


def sft(bench: Bench) -> None:
    import trl  # type: ignore[import-not-found]

    _with_trainer(
        bench, trl.SFTTrainer, trl.SFTConfig, max_length=LONGEST, dataset_kwargs={"skip_prepare_dataset": True}
    )


def _with_trainer(bench: Bench, kind: Any, arguments: Any, **options: Any) -> None:
    import tempfile

    import datasets
    import transformers

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            bench.tick()

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    numbers = [n for step in bench.plan for n in step]
    chosen = datasets.Dataset.from_dict({"input_ids": [bench.rows[n].ids for n in numbers], "number": numbers})
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            output_dir=folder, max_steps=bench.steps, per_device_train_batch_size=bench.batch, learning_rate=RATE,
            max_grad_norm=CLIP, lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_steps=10,
            disable_tqdm=True, remove_unused_columns=False, use_cpu=bench.device.type == "cpu",
            bf16=False, gradient_checkpointing=False, **options,
        )  # fmt: skip
        tokenizer = build.load_tokenizer(bench.trial)
        InOrder(
            model=bench.adapted(),
            args=args,
            train_dataset=chosen,
            data_collator=lambda some: padded(bench, [one["number"] for one in some]),
            processing_class=tokenizer,
            callbacks=[Ticks()],
        ).train()


SIDES: dict[str, Callable[[Bench], None]] = {
    **{"ours": ours, "fused": fused, "captured": captured, "plain": plain, "masked": masked},
    **{"peft": peft, "hand": hand, "trainer": trainer, "sft": sft},
}


# ---- the command -----------------------------------------------------------------------------------


def compare(bench: Bench, sides: Sequence[str], rounds: int, end: float) -> dict[str, Any]:
    """Milliseconds a step and tokens a second of every side, and how many times as fast it is as PEFT's loop."""
    fastest: dict[str, list[float]] = {}
    peaks: dict[str, float | None] = {}
    facts: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for side in sides if number % 2 else sides[::-1]:
            if fastest.keys() >= set(sides) and time.monotonic() > end:
                break
            try:
                took, peak = bench.measure(SIDES[side])
            except torch.OutOfMemoryError as error:
                print(f"{side:10} {str(error)[:100]}", flush=True)
                continue
            fastest[side] = [min(pair) for pair in zip(took, fastest.get(side, took), strict=True)]
            peaks[side] = max(peak, peaks.get(side) or 0.0) if peak is not None else None
            facts[side] = dict(bench.facts)
            print(f"{side:10} {line(bench, fastest[side], peaks[side])}, just now {sum(took):.2f} s", flush=True)
            if facts[side]:
                print(f"{'':10} {facts[side]}", flush=True)
    timed = bench.steps - WARMUP
    found: dict[str, Any] = {
        side: {
            "step_ms": 1000 * sum(took) / timed,
            "tokens_per_second": bench.tokens / sum(took),
            "peak_gb": peaks[side],
            "times_as_fast_as_peft": sum(fastest["peft"]) / sum(took) if "peft" in fastest else None,
        }
        | facts[side]
        for side, took in fastest.items()
    }
    return found


def profiled(bench: Bench, side: str) -> dict[str, float]:
    """Kernels of a step of the side, and the milliseconds that they take; of all steps, warm-up and capturing too."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        bench.measure(SIDES[side])
    kernels = [one for one in seen.events() if one.device_type.name == "CUDA"]
    steps = len(bench.marks)
    return {
        "kernels_a_step": len(kernels) / steps,
        "device_ms_a_step": sum(one.device_time for one in kernels) / 1000 / steps,
    }


def line(bench: Bench, took: Sequence[float], peak: float | None) -> str:
    total = sum(took)
    memory = f", peak {peak:.2f} GB" if peak is not None else ""
    return f"{1000 * total / (bench.steps - WARMUP):8.2f} ms a step, {bench.tokens / total:8.0f} tokens/s{memory}"


def one(words: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One setting at every batch size, in this process."""
    bench, settings = Bench(shlex.split(words), args), []
    sides = [side for side in args.sides.split(",") if side != "sft" or find_spec("trl")]
    for batch in map(int, args.batch.split(",")):
        bench.plan_batches(batch)
        found = compare(bench, sides, args.rounds, time.monotonic() + 60 * args.minutes)
        for side, figures in found.items():
            figures |= profiled(bench, side) if args.profile else {}
            ratio, kernels = figures["times_as_fast_as_peft"], figures.get("kernels_a_step")
            print(
                f"batch {batch:2} {side:10} {figures['step_ms']:8.2f} ms"
                + (f" {ratio:6.2f} x PEFT's" if ratio else "")
                + (f", {kernels:.0f} kernels of {figures['device_ms_a_step']:.2f} ms" if kernels else ""),
                flush=True,
            )
        setting = {"words": words, "batch": batch, "tokens": args.tokens, "answers": args.answers, "steps": args.steps}
        settings.append(setting | {"rounds": args.rounds, "threads": torch.get_num_threads(), "sides": found})
        keep(args.out, settings)
    return settings


def several(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of a set, each in a process of its own."""
    found = []
    for words, options in SETS[name]:
        print(f"---- {words} {options}", flush=True)
        given = [] if args.sides == DEFAULT_SIDES else ["--sides", args.sides]
        given += ["--cpu-seconds"] if args.cpu_seconds else []
        part = Path(f"{args.out or 'loops'}.part")
        command = [sys.executable, __file__, words, *options.split(), *given, "--minutes", str(args.minutes)]
        done = subprocess.run([*command, "--out", str(part)], check=False)
        if done.returncode == 0:
            found += json.loads(part.read_text())["settings"]
            keep(args.out, found)
        part.unlink(missing_ok=True)
    return found


def keep(out: Path | None, settings: list[dict[str, Any]]) -> None:
    """Write what has been measured until now, if it is to be written."""
    if out:
        content = {"benchmark": "loops", "settings": settings, "load": os.getloadavg()}
        record.write_json(out, content | {"environment": record.environment()})


DEFAULT_SIDES = "ours,plain,peft,hand,trainer,sft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", help=f"one of {', '.join(SETS)}, or words of peftsweep's command line")
    parser.add_argument("--batch", default="4", help="rows of a batch; several with commas between them")
    parser.add_argument("--tokens", type=int, default=305, help="mean length of a row")
    parser.add_argument("--answers", type=float, default=0.65, help="share of a row that is its answer")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=3.5, help="of each setting")
    parser.add_argument("--sides", default=DEFAULT_SIDES)
    parser.add_argument("--cpu-seconds", action="store_true", help="of this process, where others use the CPU too")
    parser.add_argument("--profile", action="store_true", help="count the kernels of a step, on a GPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep(args.out, several(args.setting, args) if args.setting in SETS else one(args.setting, args))


if __name__ == "__main__":
    main()
