"""One LoRA trial as one writes it by hand with transformers and PEFT: train, evaluate, save, print the scores.

Called by start_to_end.py in a loop, a process a trial.

    python benchmarks/train_one.py --model DIR --rows DIR --rank 8 --seed 0 --steps 100 --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

BATCH, MAX_LENGTH, NEW_TOKENS = 16, 128, 20


def encode(tokenizer: Any, rows: list[dict[str, str]]) -> list[tuple[list[int], int]]:
    """The tokens of each row, and where its answer begins."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
        found.append(([*prompt, *answer, tokenizer.eos_token_id][:MAX_LENGTH], len(prompt)))
    return found


def collate(batch: list[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch]),
        "labels": torch.tensor([[-100] * n + ids[n:] + [-100] * (longest - len(ids)) for ids, n in batch]),
    }


def perplexity(model: Any, rows: list[tuple[list[int], int]], pad: int) -> float:
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], pad)
        count = int((batch["labels"] != -100).sum())
        loss += float(model(**batch).loss) * count
        tokens += count
    return math.exp(loss / tokens)


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    right = 0
    for start in range(0, len(rows), 100):
        some = rows[start : start + 100]
        prompts = tokenizer([r["prompt"] for r in some], padding=True, add_special_tokens=False, return_tensors="pt")
        written = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(written[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        pairs = zip(texts, some, strict=True)
        right += sum(text.rpartition("#")[2].strip() == row["answer"].rpartition("#")[2].strip() for text, row in pairs)
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rows = {
        split: [json.loads(line) for line in (options.rows / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(options.model)
    base.eval()
    test = encode(tokenizer, rows["test"])
    with torch.no_grad():
        scores = {"base_perplexity": perplexity(base, test, tokenizer.pad_token_id)}
        scores["base_accuracy"] = accuracy(base, tokenizer, rows["test"])
    model = get_peft_model(base, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, round(0.05 * options.steps), options.steps)
    train = encode(tokenizer, rows["train"])
    random.Random(options.seed).shuffle(train)
    model.train()
    for step in range(options.steps):
        places = [(step * BATCH + n) % len(train) for n in range(BATCH)]
        model(**collate([train[place] for place in places], tokenizer.pad_token_id)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        scores["perplexity"] = perplexity(model, test, tokenizer.pad_token_id)
        scores["accuracy"] = accuracy(model, tokenizer, rows["test"])
    model.save_pretrained(options.out)
    (options.out / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
