"""Evaluation by generation beside a plain batched `generate` loop, on prompts shaped like GSM8K's.

python benchmarks/generation.py --out benchmarks/results/generation.json

Both write the same texts with the same batch size. The plain loop takes the prompts in their order, pads them on the
left and calls transformers' `generate`. They run in turns; the figure is the median ratio of the pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peftsweep.cli import compose
from peftsweep.config import build
from peftsweep.config.compose import trial as make_trial
from peftsweep.data import templates
from peftsweep.data import tokens as data_tokens
from peftsweep.evaluation import decoding
from peftsweep.models import model
from peftsweep.observe.measure import Meter
from peftsweep.tiny import task
from peftsweep.training import loop as training_loop

BATCH, NEW_TOKENS, PROMPTS = 16, 128, 96
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    adapted, tokenizer, prompts = setting()
    ratios = []
    for pair in range(options.pairs + 1):
        plain, mine = timed(plain_loop, adapted, tokenizer, prompts), timed(ours, adapted, tokenizer, prompts)
        assert plain[1] == mine[1], "the two must write the same"
        if pair:  # the first warms up
            ratios.append(plain[0] / mine[0])
    ratios.sort()
    lengths = sorted(len(tokenizer(text).input_ids) for text in mine[1])
    result = {
        "plain_seconds_over_ours": {"median": ratios[len(ratios) // 2], "least": ratios[0], "largest": ratios[-1]},
        "pairs": len(ratios),
        "prompts": len(prompts),
        "batch_size": BATCH,
        "written_tokens": {
            "least": min(lengths),
            "median": sorted(lengths)[len(lengths) // 2],
            "largest": max(lengths),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def setting() -> tuple[Any, Any, list[str]]:
    """The embedded model, taught to answer at many lengths, and prompts of 45 to 200 tokens as in GSM8K."""
    cfg = compose(["train.steps=150", "train.warmup=0"])
    one = make_trial(cfg, cfg.hydra.runtime.choices)
    tokenizer = model.load_tokenizer(one.config.model)
    adapted = build.attach_method(one, model.load(one.config.model, None, CPU), 150)
    rng = random.Random(0)
    rows = []
    for row in task.rows("train", 1500):
        story = row["question"].partition(" How many")[0]
        # A worked answer: GSM8K's have 40 to 250 tokens, and few of them are long.
        rows.append({"question": story, "answer": f"{story} " * min(int(rng.expovariate(1.0)) + 1, 6)})
    tokens = data_tokens.tokenize(tokenizer, templates.examples(rows, "{question}\n", "{answer}"), 256)
    training_loop.train(adapted, tokens, one.config.train, pad_id=0, seed=0, meter=Meter(CPU), log=lambda row: None)
    prompts = []
    for row in rows[:PROMPTS]:
        stories = [rng.choice(rows)["question"] for _ in range(min(int(rng.gauss(4, 2)), 9))]
        prompts.append(" ".join([*stories, row["question"]]) + "\n")
    return adapted.eval(), tokenizer, prompts


def timed(loop: Any, *given: Any) -> tuple[float, list[str]]:
    start = time.perf_counter()
    texts = loop(*given)
    return time.perf_counter() - start, texts


def ours(adapted: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    return decoding.generate(adapted, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=BATCH)


@torch.no_grad()
def plain_loop(adapted: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True)
        made = adapted.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()
