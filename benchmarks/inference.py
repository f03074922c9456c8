"""Evaluation beside plain transformers: tokens a second written by `generate`, and read for their likelihood.

    python benchmarks/inference.py [--batch 1,16,50] [--prompts 100] [--pairs 5] [--minutes 3.5] [--out FILE] [WORD ...]

The embedded model (or that of the words, as ``model=llama3.2_1b model.init=random model.dtype=bfloat16``) is trained
for a while to answer at many lengths; the prompts are as long as GSM8K's. Both sides write and score the same texts
with the same batch size, in turns. The plain side takes the rows in their order: it pads on the left and calls
`generate`; for the likelihood it pads on the right and takes all logits. A ratio is the median of the pairs, plain
seconds over ours. On CUDA ours is also timed once without CUDA graphs. ``--cpu-seconds`` takes the clock of the process
in place of the wall's, for a CPU that others use.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence
from copy import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from peftsweep.cli import compose
from peftsweep.config import build
from peftsweep.config.compose import trial as make_trial
from peftsweep.data import templates
from peftsweep.data import tokens as data_tokens
from peftsweep.data.tokens import Tokens
from peftsweep.evaluation import decoding, likelihood
from peftsweep.models import model
from peftsweep.observe.measure import Meter, synchronise
from peftsweep.tiny import task
from peftsweep.training import graphs
from peftsweep.training import loop as training_loop

TRAINED_ROWS, STEPS = 1500, 150
RELATIVE = 1e-3  # by which two sums of log-probabilities may differ in 32 bits


class Bench:
    """A trained model, its prompts, and the rows whose answers are scored."""

    def __init__(self, words: Sequence[str], prompts: int, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        words = [f"train.steps={STEPS}", "train.warmup=0", *words]
        cfg = compose(words)
        one = make_trial(cfg, cfg.hydra.runtime.choices, words)
        self.device = model.device(one.config.device)
        self.tokenizer = model.load_tokenizer(one.config.model)
        self.pad_id = int(self.tokenizer.pad_token_id)
        base = model.load(one.config.model, build.quantization(one), self.device)
        self.model: Any = build.attach_method(one, base, STEPS)
        chance = random.Random(0)
        stories = []
        for row in task.rows("train", TRAINED_ROWS):
            story = row["question"].partition(" How many")[0]
            # A worked answer: GSM8K's have 40 to 250 tokens, and few of them are long.
            stories.append({"question": story, "answer": f"{story} " * min(int(chance.expovariate(1.0)) + 1, 6)})
        examples = templates.examples(stories, "{question}\n", "{answer}")
        rows = data_tokens.tokenize(self.tokenizer, examples, 256)
        meter = Meter(self.device)
        training_loop.train(
            self.model, rows, one.config.train, pad_id=self.pad_id, seed=0, meter=meter, log=lambda row: None
        )
        self.model.eval()
        self.rows = rows[:prompts]
        self.prompts = []
        for row in stories[:prompts]:
            before = [chance.choice(stories)["question"] for _ in range(min(int(chance.gauss(4, 2)), 9))]
            self.prompts.append(" ".join([*before, row["question"]]) + "\n")

    def first(self, count: int) -> Bench:
        """The same with the first ``count`` prompts and rows."""
        fewer = copy(self)
        fewer.prompts, fewer.rows = self.prompts[:count], self.rows[:count]
        return fewer


# ---- the sides -------------------------------------------------------------------------------------


def write(bench: Bench, batch: int) -> list[str]:
    return decoding.generate(
        bench.model, bench.tokenizer, bench.prompts, max_new_tokens=bench.new_tokens, batch_size=batch
    )


@torch.no_grad()
def plain_write(bench: Bench, batch: int) -> list[str]:
    tokenizer, texts = bench.tokenizer, []
    tokenizer.padding_side = "left"
    for start in range(0, len(bench.prompts), batch):
        given = tokenizer(bench.prompts[start : start + batch], return_tensors="pt", padding=True).to(bench.device)
        made = bench.model.generate(
            **given, max_new_tokens=bench.new_tokens, do_sample=False, pad_token_id=bench.pad_id
        )
        texts += tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(bench: Bench, batch: int) -> list[float]:
    return likelihood.log_likelihoods(bench.model, bench.rows, pad_id=bench.pad_id, batch_size=batch)


@torch.no_grad()
def plain_score(bench: Bench, batch: int) -> list[float]:
    sums = []
    for start in range(0, len(bench.rows), batch):
        some = bench.rows[start : start + batch]
        longest = max(len(row.ids) for row in some)
        ids = torch.tensor([row.ids + [bench.pad_id] * (longest - len(row.ids)) for row in some], device=bench.device)
        present = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in some])
        logits = bench.model(input_ids=ids, attention_mask=present.to(bench.device), use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        sums += [-float(mine[_answer(row)].sum()) for row, mine in zip(some, losses.cpu(), strict=True)]
    return sums


def _answer(row: Tokens) -> slice:
    return slice(row.answer_start - 1, len(row.ids) - 1)


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether both sides have found the same texts, or the same numbers to rounding in the model's number format."""
    if isinstance(one[0], str):
        return list(one) == list(other)
    return all(abs(a - b) <= RELATIVE * max(abs(a), 1.0) for a, b in zip(one, other, strict=True))


SIDES: dict[str, tuple[Callable[[Bench, int], Sequence[Any]], Callable[[Bench, int], Sequence[Any]]]] = {
    "write": (write, plain_write),
    "score": (score, plain_score),
}


# ---- the command -----------------------------------------------------------------------------------


def compare(bench: Bench, work: str, batch: int, pairs: int, end: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Tokens a second of both sides, and the ratios of pairs; no further pair begins after ``end``."""
    sides, seconds = SIDES[work], list[list[float]]()
    found: list[Sequence[Any]] = []
    for number in range(pairs + 1):  # the first warms up
        if number > 1 and time.perf_counter() > end:
            break
        took = dict[int, float]()
        found = [[], []]
        for place in (0, 1)[:: 1 if number % 2 else -1]:
            synchronise(bench.device)
            begun = clock()
            found[place] = sides[place](bench, batch)
            synchronise(bench.device)
            took[place] = clock() - begun
            print(f"    {work} batch {batch}: {('ours', 'plain')[place]} {took[place]:.2f} s", flush=True)
        if number:
            seconds.append([took[0], took[1]])
    ratios = sorted(plain / mine for mine, plain in seconds)
    without = {}
    if bench.device.type == "cuda" and work == "write":
        with graphs.allowed_if(False):
            begun = clock()
            sides[0](bench, batch)
            synchronise(bench.device)
            without = {"seconds_without_graphs_over_ours": (clock() - begun) / statistics.median(m for m, _ in seconds)}
    return without | {
        "work": work,
        "batch_size": batch,
        "plain_seconds_over_ours": {"median": statistics.median(ratios), "least": ratios[0], "largest": ratios[-1]},
        "tokens_per_second": _tokens(bench, work, found[0]) / statistics.median(mine for mine, _ in seconds),
        "pairs": len(ratios),
        "same": same(*found),  # texts in 16 bits may part where two words are about as likely
    }


def _tokens(bench: Bench, work: str, texts: Sequence[Any]) -> int:
    if work == "score":
        return sum(len(row.ids) for row in bench.rows)
    return sum(len(bench.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts)


def main() -> None:
    """Print a line for each work and batch size, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--batch", default="1,16,50")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batches", type=int, default=100, help="the most batches of each size")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--works", default=",".join(SIDES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=3.5)
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig()
    logging.getLogger("peftsweep.evaluation").setLevel(logging.INFO)  # why there are no graphs
    begun, clock = time.perf_counter(), time.process_time if args.cpu_seconds else time.perf_counter
    bench = Bench(args.words, args.prompts, args.new_tokens)
    settings = [(work, int(batch)) for work in args.works.split(",") for batch in args.batch.split(",")]
    rows = []
    for number, (work, batch) in enumerate(settings):
        now = time.perf_counter()
        share = (begun + 60 * args.minutes - now) / (len(settings) - number)
        rows.append(compare(bench.first(batch * args.batches), work, batch, args.pairs, now + share, clock))
        print(json.dumps(rows[-1]), flush=True)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts = {"device": device, "words": args.words, "prompts": args.prompts, "new_tokens": args.new_tokens}
    facts |= {"clock": "cpu" if args.cpu_seconds else "wall"}
    facts |= {"versions": {name: version(name) for name in ("torch", "transformers", "peft")}}
    if args.out:
        args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
