"""The loop."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peftsweep import InputError
from peftsweep.data import batches, templates
from peftsweep.data import tokens as data_tokens
from peftsweep.evaluation import decoding, evaluate, likelihood
from peftsweep.evaluation.metrics import exact_match
from peftsweep.models import attach, model, probe
from peftsweep.models import losses as models_losses
from peftsweep.models import parts as models_parts
from peftsweep.observe.measure import Meter
from peftsweep.schema import Dtype, ModelConfig, Schedule, TargetsConfig, Task, TrainConfig
from peftsweep.training import length as training_length
from peftsweep.training import loop
from peftsweep.training import optimizer as training_optimizer
from peftsweep.training.run import Trained
from tests.architectures import small_config
from tests.conftest import SAME_WEIGHTS, apart

CPU = torch.device("cpu")
TINY = ModelConfig(name_or_path="tiny")


@pytest.fixture(scope="module")
def rows() -> list[data_tokens.Tokens]:
    from peftsweep.tiny import task

    examples = templates.examples(task.rows("train", 48), "{question} ", "{answer}")
    return data_tokens.tokenize(model.load_tokenizer(TINY), examples, 128)


def adapted(target_modules: Any = ("q_proj", "v_proj", "down_proj"), **options: Any) -> Any:
    base = copy.deepcopy(_base())
    torch.manual_seed(0)
    method = LoraConfig(r=4, target_modules=target_modules, **options)
    return attach.attach(base, method, TargetsConfig(), {})


@functools.cache
def _base() -> Any:
    """The base, loaded once and never changed."""
    base = model.load(TINY, None, CPU)
    probe.abilities(base)
    return base


def run(
    rows: list[data_tokens.Tokens],
    trained: Any = None,
    validate: Callable[[], dict[str, float]] | None = None,
    **options: Any,
) -> tuple[Trained, list[dict[str, Any]], dict[str, torch.Tensor]]:
    trained = trained or adapted()
    lines: list[dict[str, Any]] = []
    config = TrainConfig(**{"steps": 6, "batch_size": 4, "log_every": 1, "learning_rate": 4e-3} | options)
    done = loop.train(trained, rows, config, pad_id=0, seed=0, meter=Meter(CPU), log=lines.append, validate=validate)
    return done, lines, {name: p.detach().clone() for name, p in models_parts.trainable_parameters(trained)}


@pytest.fixture(scope="module")
def plain(rows: list[data_tokens.Tokens]) -> tuple[Trained, list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Four steps without an option, which others are compared with."""
    return run(rows, steps=4)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in lines if "loss" in row]


def same(a: dict[str, torch.Tensor], b: dict[str, Any], atol: float = 0.0) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)


@pytest.mark.kernels
def test_the_loop_is_that_of_a_plain_torch_script(rows: list[data_tokens.Tokens]) -> None:
    """Written out again: AdamW, clipping, linear warm-up and cosine, mean over the batch's answer tokens."""
    reference = adapted()
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    order = batches.batch_order([len(row.ids) for row in rows], 4, 0)
    reference.train()
    expected = []
    for step in range(6):
        for group in optimizer.param_groups:
            warm = min(1.0, step / 2)
            group["lr"] = 4e-3 * (warm if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4)))
        batch = batches.collate([rows[n] for n in next(order)], 0)
        labels = batch.input_ids[:, 1:].masked_fill(~batch.answer_mask, -100)
        logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    _, lines, weights = run(rows, warmup=2)
    assert losses(lines) == pytest.approx(expected, abs=1e-5)
    assert apart(weights, dict(models_parts.trainable_parameters(reference))) <= SAME_WEIGHTS


def test_checkpointing_trains_a_model_that_changes_its_embeddings_in_place(rows: list[data_tokens.Tokens]) -> None:
    torch.manual_seed(0)
    base = model.CLASSES[Task.causal_lm].from_config(small_config("git"), dtype=torch.float32).requires_grad_(False)
    for part in base.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    probe.abilities(base)

    def trained(checkpointing: bool) -> Any:
        torch.manual_seed(0)
        made = attach.attach(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"), TargetsConfig(), {})
        return run(rows, made, checkpointing=checkpointing)

    plain, checkpointed = trained(False), trained(True)
    assert losses(checkpointed[1]) == pytest.approx(losses(plain[1]), abs=1e-5)
    assert apart(checkpointed[2], plain[2]) <= SAME_WEIGHTS


@pytest.mark.kernels
def test_two_runs_are_the_same_bit_for_bit(rows: list[data_tokens.Tokens]) -> None:
    first, second = (run(rows, adapted(lora_dropout=0.1), steps=3) for _ in range(2))
    assert losses(first[1]) == losses(second[1])
    assert same(first[2], second[2])


@pytest.mark.kernels
def test_accumulation_changes_memory_and_not_results(rows: list[data_tokens.Tokens]) -> None:
    some = rows[:5]  # of unlike lengths; an epoch ends with a step of one row
    whole, parts = (run(some, steps=4, batch_size=size, accumulation=4 // size) for size in (4, 1))
    assert losses(parts[1]) == pytest.approx(losses(whole[1]), rel=1e-4)
    assert parts[0].tokens == whole[0].tokens
    assert parts[0].epochs == whole[0].epochs == 2
    assert [row["step"] for row in parts[1] if "epoch_loss" in row] == [2, 4]


def test_a_step_takes_the_same_rows_however_they_are_accumulated(rows: list[data_tokens.Tokens]) -> None:
    def steps(batch_size: int) -> list[list[int]]:
        config = TrainConfig(batch_size=batch_size, accumulation=16 // batch_size)
        order = batches.batch_order([len(row.ids) for row in rows[:43]], training_length.rows_per_step(config), 3)
        found = list(itertools.islice(batches.micro_batches(order, batch_size), 7))
        assert all(len(part) <= batch_size for step in found for part in step)
        return [sorted(itertools.chain.from_iterable(step)) for step in found]

    assert steps(16) == steps(4) == steps(1) == steps(8)
    assert sorted(itertools.chain.from_iterable(steps(4)[:3])) == list(range(43))  # an epoch, each row once


def test_a_data_dependent_regulariser_counts_by_answer_tokens(
    rows: list[data_tokens.Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is a mean over the answer tokens of its micro-batch is, summed up, the mean over those of the step."""
    monkeypatch.setattr(
        loop, "auxiliary_loss", lambda trained, batch: models_losses.answer_losses(trained, batch).mean()
    )
    options: dict[str, Any] = {"steps": 2, "warmup": 0, "optimizer": "SGD", "clip": 0.0}
    one = run(rows[:11], **options, batch_size=8)
    parts = run(rows[:11], **options, batch_size=4, accumulation=2)
    assert same(one[2], parts[2], atol=1e-6)


@pytest.mark.kernels
def test_gradient_checkpointing_gives_the_same_weights(rows: list[data_tokens.Tokens], plain: Any) -> None:
    assert same(plain[2], run(rows, steps=4, checkpointing=True)[2], atol=1e-6)


# Few CPUs are fast in bfloat16; `tests/trial/test_stages.py` has a short trial with it.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"autocast": Dtype.bfloat16}, marks=pytest.mark.slow),
        {"optimizer": "SGD", "learning_rate": 0.5},
    ],
)
def test_other_ways_to_train_learn_too(rows: list[data_tokens.Tokens], options: dict[str, Any]) -> None:
    _, lines, _ = run(rows, steps=12, **options)
    assert losses(lines)[-1] < losses(lines)[0] - 0.5


def test_an_8_bit_optimizer_and_its_options_can_be_named(rows: list[data_tokens.Tokens]) -> None:
    _, lines, _ = run(rows, steps=4, optimizer="bitsandbytes.optim.AdamW8bit", optimizer_kwargs={"betas": [0.9, 0.99]})
    assert losses(lines)[-1] < losses(lines)[0]
    with pytest.raises(InputError, match=r"train.optimizer_kwargs: .*beta"):
        run(rows, optimizer_kwargs={"beta": 1})


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [("LBFGS", "need a closure"), ("SparseAdam", "sparse gradients only"), ("bitsandbytes.optim.SGD8bit", "momentum")],
)
def test_an_optimizer_that_cannot_take_a_step_is_refused(
    rows: list[data_tokens.Tokens], optimizer: str, reason: str
) -> None:
    with pytest.raises(InputError, match=rf"train.optimizer\w*[=:].*{reason}"):
        run(rows, optimizer=optimizer)


def test_weight_decay_acts_in_loraplus_and_is_refused_by_an_optimizer_without_any() -> None:
    name = "peft.optimizers.create_loraplus_optimizer"
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, optimizer=name, optimizer_kwargs={"loraplus_lr_ratio": 4})
    adapted = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(target_modules=["0"], r=2))
    weights = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    before = {key: torch.nn.init.ones_(p).detach().clone() for key, p in weights.items()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    training_optimizer.make_optimizer(adapted, config).step()
    for key, weight in weights.items():  # AdamW without a gradient: the weight times 1 - rate * decay
        rate = 0.1 * (4 if "lora_B" in key else 1)
        torch.testing.assert_close(weight.detach(), before[key] * (1 - rate * 0.5))
    with pytest.raises(InputError, match=r"train\.weight_decay=0\.5: Rprop has no weight decay"):
        training_optimizer.make_optimizer(adapted, TrainConfig(weight_decay=0.5, optimizer="Rprop"))


def test_schedules() -> None:
    def rates(schedule: Schedule, warmup: float) -> list[float]:
        config = TrainConfig(learning_rate=1.0, schedule=schedule, warmup=warmup)
        optimizer = training_optimizer.make_optimizer(torch.nn.Linear(1, 1), config)
        scheduler = training_optimizer.make_scheduler(optimizer, config, steps=10)
        found = []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    assert rates(Schedule.constant, 2) == [0, 0.5, *[1] * 8]
    assert rates(Schedule.linear, 0.2) == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert rates(Schedule.cosine, 0)[5] == pytest.approx(0.5)


def test_epochs_count_instead_of_steps() -> None:
    assert training_length.total_steps(TrainConfig(epochs=1.5, batch_size=8, accumulation=2), rows=48) == 5
    assert training_length.total_steps(TrainConfig(steps=7), rows=48) == 7


@pytest.mark.parametrize(
    ("interval", "steps"), [("100", 100), ("1epoch", 12), ("0.5epochs", 6), ("0.001epochs", 1), (None, None)]
)
def test_an_interval_is_steps_or_epochs(interval: str | None, steps: int | None) -> None:
    assert training_length.interval(TrainConfig(eval_every=interval, batch_size=4), "eval_every", rows=48) == steps


@pytest.mark.parametrize("interval", ["1.5", "0", "-1epochs", "epoch", "3 epochsies", "nan", "infepochs"])
def test_other_intervals_are_refused(interval: str) -> None:
    config = TrainConfig(eval_every=interval, checkpoint_every=interval)
    for key in ("eval_every", "checkpoint_every"):
        with pytest.raises(InputError, match=rf"train.{key}="):
            training_length.interval(config, key, rows=48)


def test_keep_best_ends_with_the_weights_of_the_best_validation(rows: list[data_tokens.Tokens]) -> None:
    trained = adapted()
    scripted = iter([0.5, 0.3, 0.9])
    seen: list[dict[str, torch.Tensor]] = []

    def validate() -> dict[str, float]:
        seen.append({name: p.detach().clone() for name, p in models_parts.trainable_parameters(trained)})
        return {"loss": next(scripted), "tiny_math.accuracy": 0.0}

    done, lines, weights = run(rows, trained, validate, steps=3, eval_every="1", keep_best=True)
    assert (done.best_loss, done.best_step) == (0.3, 2)
    assert same(weights, seen[1])
    assert not same(weights, seen[2])
    rows_of_validation = [row for row in lines if "validation_loss" in row]
    assert [row["step"] for row in rows_of_validation] == [1, 2, 3]
    assert rows_of_validation[0]["validation_tiny_math.accuracy"] == 0.0


@pytest.mark.parametrize(("metric", "best"), [("tiny_math.accuracy", 3), ("tiny_math.perplexity", 1), ("loss", 2)])
def test_the_best_validation_is_chosen_by_the_metric_asked_for(
    rows: list[data_tokens.Tokens], metric: str, best: int
) -> None:
    scripted = zip([0.5, 0.3, 0.9], [0.1, 0.4, 0.6], [2.0, 3.0, 4.0], strict=True)

    def validate() -> dict[str, float]:
        return dict(zip(("loss", "tiny_math.accuracy", "tiny_math.perplexity"), next(scripted), strict=True))

    done, _, _ = run(rows, adapted(), validate, steps=3, eval_every="1", keep_best=True, best_metric=metric)
    assert (done.best_loss, done.best_step) == (0.3, best)


def test_a_metric_that_no_validation_has_is_named_with_those_it_has(rows: list[data_tokens.Tokens]) -> None:
    with pytest.raises(InputError, match=r"tiny_math.f1: the validation has loss, tiny_math.accuracy"):
        run(
            rows,
            adapted(),
            lambda: {"loss": 1.0, "tiny_math.accuracy": 0.0},
            eval_every="2",
            best_metric="tiny_math.f1",
        )


def test_tokens_and_padding_are_counted(rows: list[data_tokens.Tokens]) -> None:
    rows = rows[:24]
    done, lines, _ = run(rows, epochs=1, log_every=3)
    assert done.tokens == sum(len(row.ids) for row in rows)
    assert (done.steps, done.epochs, len(done.step_seconds)) == (6, 1.0, 6)
    assert 0 <= done.padding_fraction < 0.2
    assert [row["step"] for row in lines if "loss" in row] == [3, 6]


def test_a_loss_that_is_not_finite_ends_the_run(rows: list[data_tokens.Tokens]) -> None:
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) at step"):
        run(rows, optimizer="SGD", learning_rate=1e30, clip=0.0)


def test_no_steps_train_nothing(rows: list[data_tokens.Tokens]) -> None:
    done, lines, _ = run(rows, steps=0)
    assert (done.tokens, done.final_loss, lines) == (0, None, [])


@pytest.mark.kernels
def test_generation_does_not_depend_on_the_batch_and_stops_at_the_end_mark() -> None:
    base, tokenizer = model.load(TINY, None, CPU), model.load_tokenizer(TINY)
    prompts = ["Tom has 47 apples. Tom buys 38 apples. ", "47+38=", "Mia", "12+"]
    together = decoding.generate(base, tokenizer, prompts, max_new_tokens=12, batch_size=4)
    alone = decoding.generate(base, tokenizer, prompts, max_new_tokens=12, batch_size=1)
    assert together == alone
    assert not any(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))


@pytest.mark.kernels
def test_log_likelihoods_do_not_depend_on_the_batch() -> None:
    base, tokenizer = model.load(TINY, None, CPU), model.load_tokenizer(TINY)
    examples = [
        templates.Example("Tom has 47 apples. ", "Who? Tom"),
        templates.Example("47+38=", "85"),
        templates.Example("", "a"),
    ]
    tokens = data_tokens.tokenize(tokenizer, examples, 64)
    together = likelihood.log_likelihoods(base, tokens, pad_id=0, batch_size=3)
    alone = likelihood.log_likelihoods(base, tokens, pad_id=0, batch_size=1)
    assert together == pytest.approx(alone, abs=1e-4)


def test_generation_scores_each_row(scratch: Path) -> None:
    base, tokenizer = model.load(TINY, None, CPU), model.load_tokenizer(TINY)
    generated = decoding.generate(base, tokenizer, ["47+38="], max_new_tokens=4)[0]
    examples = [templates.Example("47+38=", generated), templates.Example("47+38=", "wrong")]
    found = evaluate.generation(base, tokenizer, examples, metric=exact_match, max_new_tokens=4)
    assert found.scores["accuracy"].value == 0.5
    assert [row["correct"] for row in found.predictions] == [True, False]


def test_every_whole_epoch_has_a_row_of_its_own(rows: list[data_tokens.Tokens]) -> None:
    rows = rows[:12]
    done, lines, _ = run(rows, steps=7)  # of 3 steps an epoch
    epochs = [row for row in lines if "epoch_loss" in row]
    assert [(row["step"], row["epoch"]) for row in epochs] == [(3, 1), (6, 2)]
    assert epochs[1]["epoch_loss"] == pytest.approx(sum(losses(lines)[3:6]) / 3)
    assert epochs[1]["epoch_seconds"] == pytest.approx(sum(done.step_seconds[3:6]))
    tokens = sum(len(row.ids) for row in rows)
    assert epochs[0]["epoch_tokens_per_second"] == pytest.approx(tokens / epochs[0]["epoch_seconds"])


def test_an_epoch_ends_with_a_smaller_step(rows: list[data_tokens.Tokens]) -> None:
    rows = rows[:12]
    done, lines, _ = run(rows, steps=4, batch_size=4, accumulation=2)  # of 8 and 4 rows
    assert [row["step"] for row in lines if "epoch_loss" in row] == [2, 4]
    assert done.tokens == 2 * sum(len(row.ids) for row in rows)


@pytest.mark.parametrize("options", [{"learning_rate": 1e30}, {"learning_rate": math.inf}])
def test_a_step_that_ruins_the_weights_is_a_failure(rows: list[data_tokens.Tokens], options: dict[str, Any]) -> None:
    with pytest.raises(FloatingPointError, match=r"after step 1.*; lower train.learning_rate(, such as 0\.001)?$"):
        run(rows, adapted(target_modules="all-linear"), steps=1, warmup=0, **options)


def test_overflow_in_float16_is_told_by_the_key_that_chose_it(rows: list[data_tokens.Tokens]) -> None:
    with pytest.raises(FloatingPointError, match=r"train.autocast=float16 overflows above 65504: take bfloat16"):
        run(rows, steps=1, warmup=0, learning_rate=1e30, autocast=Dtype.float16)
    half = attach.attach(
        model.load(ModelConfig(name_or_path="tiny", dtype=Dtype.float16), None, CPU),
        LoraConfig(r=4, target_modules="all-linear"),
        TargetsConfig(),
        {},
    )
    with pytest.raises(FloatingPointError, match=r"model.dtype=float16 overflows above 65504: take bfloat16"):
        run(rows, half, steps=1, warmup=0, learning_rate=1e30)


def test_a_validation_that_is_no_number_is_never_the_best(rows: list[data_tokens.Tokens]) -> None:
    found = iter([math.nan, 2.0, 3.0])
    done, _, _ = run(rows, validate=lambda: {"loss": next(found)}, steps=3, eval_every="1", keep_best=True)
    assert (done.best_step, done.best_loss) == (2, 2.0)


@pytest.mark.parametrize(("warmup", "steps", "allowed"), [(4, 4, False), (3, 4, True), (0.9, 4, False), (0.5, 1, True)])
def test_a_warmup_must_be_shorter_than_the_training(warmup: float, steps: int, allowed: bool) -> None:
    if allowed:
        training_optimizer.check_warmup(TrainConfig(warmup=warmup), steps)
        return
    with pytest.raises(InputError, match=rf"train.warmup={warmup:g}: 4 steps, must be fewer than the {steps} of the"):
        training_optimizer.check_warmup(TrainConfig(warmup=warmup), steps)


@pytest.mark.kernels
def test_padding_to_a_multiple_changes_no_loss(rows: list[data_tokens.Tokens], plain: Any) -> None:
    padded, others, _ = run(rows, steps=4, pad_to_multiple_of=16)
    assert losses(others) == pytest.approx(losses(plain[1]), rel=1e-5)
    assert padded.padding_fraction > plain[0].padding_fraction


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_losses_and_says_what_was_compiled(rows: list[data_tokens.Tokens]) -> None:
    _, lines, _ = run(rows)
    done, others, _ = run(rows, compile="eager")
    assert losses(others) == pytest.approx(losses(lines), rel=1e-5)
    assert done.compilation["recompile_seconds"] >= 0
    assert done.compilation["compile_graphs"] >= 1
    assert done.compilation["compile_graph_breaks"] == 0
    assert min(done.step_seconds) > 0


@pytest.mark.parametrize(("fault", "reason"), [("raises", "no compiler"), ("lies", "the compiled model's loss is")])
def test_compiling_that_fails_is_off_with_its_reason(
    rows: list[data_tokens.Tokens], plain: Any, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    def broken(trained: Any, **_: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("no compiler")
            output = trained(*arguments, **options)
            output.logits = output.logits * 3
            return output

        return call

    monkeypatch.setattr(torch, "compile", broken)
    done, others, _ = run(rows, steps=4, compile="inductor")
    assert reason in done.compilation["compile_off"]
    assert losses(others) == losses(plain[1])


@pytest.mark.parametrize("seed", range(5))
def test_typical_steps_are_of_the_sizes_of_the_whole_run(seed: int) -> None:
    lengths = random.Random(seed).choices([10, 12, 15, 20, 30, 60, 200], [30, 25, 20, 10, 8, 5, 2], k=640)
    rows = [data_tokens.Tokens(list(range(length)), length // 2) for length in lengths]
    config = TrainConfig(batch_size=4, accumulation=2, epochs=1)
    order = itertools.islice(batches.batch_order(lengths, 8, seed), 80)  # the run, computed here on its own
    longest = [[max(lengths[n] for n in step[start : start + 4]) for start in (0, 4)] for step in order]
    sizes = [4 * sum(pair) for pair in longest]
    for last in (3, 5, 8):
        chosen = training_length.typical_steps(rows, config, seed, 8)[-last:]
        found = [training_length.padded_tokens(step, rows, config) for step in chosen]
        assert statistics.median(found) == pytest.approx(statistics.median(sizes), rel=0.25)
        assert set(found) <= set(sizes)
        assert min(found) < statistics.median(sizes) < max(found)
