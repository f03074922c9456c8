"""Train the embedded model from nothing: its tokenizer, its weights, and a check of what it can do.

    python -m peftsweep.tiny.make --out DIR

Text and starting weights are seeded; another number of threads still changes the last digits of the result.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftsweep.tiny import task

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SKILL_ROWS = 200


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any text can be written, with one token per digit, so that numbers align."""
    bpe = Tokenizer(models.BPE())
    # Digits are cut first: the space before a number is then a token of its own, wherever it stands.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # A prompt needs a BOS and no EOS, so that is what the tokenizer adds by itself.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    wrap: Any = PreTrainedTokenizerFast  # its constructor carries no annotations
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.92M parameters; every width is a multiple of 64, as 4-bit blocks need."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    args: argparse.Namespace,
) -> None:
    """Next-token prediction on endless fresh text, AdamW with a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(1, args.steps + 1):
        texts = [task.pretraining_text(rng) + EOS for _ in range(args.batch)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        # Padding is on the right and the mask is causal: no real token looks at it, so no mask is needed.
        loss = model(input_ids=batch.input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """The share of prompts that the model completes exactly as wanted, up to the end of the line."""
    batch = tokenizer([prompt for prompt, _ in pairs], padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    right = [text.split("\n")[0] == wanted for text, (_, wanted) in zip(texts, pairs, strict=True)]
    return sum(right) / len(right)


def skills(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Accuracy on everything that pretraining taught, and on the task that it did not."""
    rng = random.Random("skills")
    pairs = [(rng.randint(2, task.LARGEST), rng.randint(2, task.LARGEST)) for _ in range(SKILL_ROWS)]
    pairs_by_skill = {}
    for kind, equation in (("addition", task.add), ("subtraction", task.subtract)):
        cut = [equation(*pair).partition("=") for pair in pairs]
        pairs_by_skill[kind] = [(left + equals, result) for left, equals, result in cut]
    for name, probe in task.PROBES.items():
        stories = [task.draw_story(rng) for _ in range(SKILL_ROWS)]
        pairs_by_skill[name] = [(f"{story.text} {probe(story)[0]}\n", probe(story)[1]) for story in stories]
    pairs_by_skill["the task"] = [(row["question"] + "\n", row["answer"]) for row in task.rows("test", SKILL_ROWS)]
    return {name: accuracy(model, tokenizer, prompts) for name, prompts in pairs_by_skill.items()}


def main() -> None:
    """Make the tokenizer and the model, save both, and print what the model can do."""
    parser = argparse.ArgumentParser(description="Make the embedded model of peftsweep from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the tokenizer")
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--batch", type=int, default=96, help="documents per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--vocabulary", type=int, default=768, help="most tokens the tokenizer may have")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text and of the weights")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer((task.pretraining_text(rng) for _ in range(20_000)), args.vocabulary)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer, rng, args)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for name, share in skills(model, tokenizer).items():
        print(f"{name:>12}  {share:6.1%}")


if __name__ == "__main__":
    main()
