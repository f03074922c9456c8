"""One trial while it runs: its stages in order, on one loaded base."""

from __future__ import annotations

import copy
import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel

from peftsweep.config import build
from peftsweep.config.build import Model
from peftsweep.config.compose import Trial
from peftsweep.data import batches
from peftsweep.data import rows as data_rows
from peftsweep.data import tokens as data_tokens
from peftsweep.data.templates import Example
from peftsweep.evaluation import evaluate as evaluation_evaluate
from peftsweep.evaluation import inference, likelihood, scaled
from peftsweep.forecast import forecast
from peftsweep.models import losses, parts, probe
from peftsweep.models import saved as models_saved
from peftsweep.models.quantised.layers import footprint
from peftsweep.observe.display import Observer
from peftsweep.observe.measure import Meter, Stage
from peftsweep.schema import Capture, Role
from peftsweep.search import pruning
from peftsweep.study import claims, record, rungs, store, sweep_record
from peftsweep.study.reading import Unreadable
from peftsweep.study.record import Result
from peftsweep.training import checkpoint, compiled, graphs, length, loop, optimizer, run
from peftsweep.training.run import Trained
from peftsweep.trial import foreseen, seen
from peftsweep.trial.done import Oversized, Refused, folder, trained
from peftsweep.trial.faults import faults
from peftsweep.trial.outcome import Attempts, log_step, train_cost, train_info
from peftsweep.trial.scores import COST, EvaluationCache, base_scores
from peftsweep.trial.stages import merge_adapter, reload_adapter, row_sources

log = logging.getLogger(__name__)
Answers = tuple[batches.Batch, torch.Tensor]  # a batch, and a model's losses on it
# The largest difference of profiled steps from the trial's median step size, as a share of it, without a warning.
MAX_STEP_SIZE_DIFFERENCE = 0.1
MEASURED_STEPS = 13  # of a packed trial's step alone; its times leave out the first three
OCCUPIED_BYTES = 1e9  # bytes of a device that other processes hold, beyond those of its driver


class Session:
    """A running trial: each method is a step of it and writes its results into the record."""

    base: PreTrainedModel
    adapted: Model

    def __init__(
        self, trial: Trial, result: Result, meter: Meter, observer: Observer, attempts: Attempts | None = None
    ) -> None:
        self.trial, self.result, self.meter, self.observer = trial, result, meter, observer
        self.config, self.info, self.place = trial.config, result.train_info, folder(trial)
        self.attempts = attempts or Attempts(self.place, meter)
        self.kept = EvaluationCache(trial, self.place / store.CHECKPOINTS, meter.device, self.attempts)
        self.bare: Any = None  # the untouched base, kept beside the adapted one to be timed
        self.earlier = trained(trial)
        self.profiled_steps = 0
        self.stopped_early = False  # before its last step, by its validations

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        self.check_claim()
        self.observer.stage(name)
        log.info("%s", name)
        with self.meter.stage(name) as own:
            yield own

    def check_claim(self) -> None:
        """Raise ``study.Claimed`` if another process has taken over the trial."""
        claims.check_claim(self.place.parent, self.trial.identity)

    def refuse(self) -> None:
        if reason := forecast.refusal(self.trial):
            raise Refused(reason)
        if self.config.skip_oversized:
            at_once = sweep_record.trials_at_once()
            if reason := forecast.oversized(self.trial, own_order=True, at_once=at_once):
                raise Oversized(reason)
        self.result.memory["start"] = before = self.meter.start()
        if (before["others"] or 0) > OCCUPIED_BYTES or before["allocated"]:
            log.warning("the device is not empty: others hold %s bytes", before["others"])

    def load(self) -> None:
        build.drop_other_base(self.trial, self.meter.device)
        with self.stage("load"):
            self.tokenizer = build.load_tokenizer(self.trial)
            self.base = build.load_base(self.trial, self.tokenizer, self.meter.device, dropped=True)
            self.pad_id = int(self.tokenizer.pad_token_id)
        self.info["base_parameters"] = parts.count(self.base).total
        self.info["base_bytes"] = footprint(self.base)
        if parts.classifies(self.base):
            self.info["padded_batches"] = not getattr(self.base, losses.READS_PADDING)
        else:
            self.info |= probe.abilities(self.base).facts()

    def read(self) -> None:
        config, tokenizer = self.config, self.tokenizer
        with self.stage("data"):
            validated = config.train.eval_every is not None
            self.rows = rows = self.trial.rows or data_rows.load_rows(config.dataset, validation=validated)
            self.tokens = build.training_tokens(self.trial, tokenizer, rows.train)
            build.check_tokens(tokenizer, self.base, self.tokens)
            self.tests = {name: build.test_examples(self.trial, name, rows, tokenizer) for name in config.eval}
        long_rows = rows.left_out.get("long_rows", 0) + len(rows.train) - len(self.tokens)
        self.info |= {"training_rows": len(self.tokens)} | rows.left_out | {"long_rows": long_rows}
        self.result.meta_info |= row_sources(self.trial, self.base, tokenizer, rows)
        self.info["truncated_rows"] = sum(row.is_cut for row in self.tokens)
        self.info |= data_tokens.truncations(self.tokens)
        optimizer.check_warmup(config.train, length.total_steps(config.train, len(self.tokens)))
        self.stop_at = self.rung_step(len(self.tokens))

    def rung_step(self, rows: int) -> int | None:
        """The step of the rung at which training on this number of rows stops; None: it runs to its end."""
        total = length.total_steps(self.config.train, rows)
        return None if self.earlier else rungs.stop_at(self.config.halving, total)

    def score_base(self) -> None:
        counts = self.seen()
        for name, test in self.tests.items():
            with self.stage("baseline"):
                scores = base_scores(self.trial, name, test, self.base, self.tokenizer, self.place.parent)
            known = {f"base_{metric}": score for metric, score in scores.items()}
            self.result.eval_info[name] = known | counts[name]

    def score_base_again(self) -> None:
        """Write the untouched base's answers, which a finished trial lacks, and its scores into the record."""
        self.load()
        self.read()
        for name, test in self.tests.items():
            scores = base_scores(self.trial, name, test, self.base, self.tokenizer, self.place.parent)
            self.result.eval_info[name] |= {f"base_{metric}": score for metric, score in scores.items()}
        del self.base

    def seen(self) -> dict[str, seen.Facts]:
        return seen.seen(self.trial, self.rows, self.tokens, self.tests, self.tokenizer)

    def share(self, other: Session) -> None:
        """Take over the base, the rows and their facts from ``other``, a trial on the same base and rows."""
        self.base, self.adapted = other.base, other.adapted
        self.tokenizer, self.pad_id = other.tokenizer, other.pad_id
        self.rows, self.tokens, self.tests = other.rows, other.tokens, other.tests
        self.info |= other.info
        self.result.meta_info |= other.result.meta_info
        self.stop_at = self.rung_step(len(self.tokens))
        self.result.eval_info = copy.deepcopy(other.result.eval_info) if self.stop_at is None else {}
        if self.result.eval_info and self.config.train != other.config.train:  # which may take fewer rows
            for name, facts in self.seen().items():
                self.result.eval_info[name] |= facts

    def adapt(self) -> None:
        """Attach the method and train it, or take an adapter that was trained before."""
        config, info, earlier = self.config, self.info, self.earlier
        if config.inference:
            self.bare = inference.bare(self.base)
        if config.adapter.path is not None:
            self._restore(store.adapter(config.adapter.path))
            total = parts.count(self.adapted).total
            info |= {"trainable_parameters": 0, "total_parameters": total, "steps": 0, "train_seconds": 0.0}
        elif earlier:
            self._restore((earlier.folder or self.place) / store.ADAPTER)
            info |= earlier.train_info | {"trained_by": earlier.trial}
            for own in ("profile", "predicted"):  # which are the earlier trial's own
                info.pop(own, None)
            self.result.memory["train"] = earlier.memory["train"]
        else:
            self._attach()
            self._train()

    def _restore(self, saved: Path) -> None:
        with self.stage("attach"):
            self.adapted = build.restore(self.trial, self.base, saved)
            self.info["coverage"] = build.coverage_of(self.adapted)

    def _attach(self) -> None:
        with self.stage("attach"):
            torch.manual_seed(self.config.seed)  # the seed of the adapter's initial weights
            steps = length.total_steps(self.config.train, len(self.tokens))
            initialise = build.initialisation(self.trial, self.place, self.base, self.tokens, self.tokenizer)
            self.adapted = build.attach_method(self.trial, self.base, steps, initialise)
            self.info["coverage"] = build.coverage_of(self.adapted)

    def _train(self) -> None:
        foreseen.memory(self.trial, self.result, self.tokens)
        flops = foreseen.predict_time(self.trial, self.result, self.rows, self.tokens, self.meter.device)
        self.observer.expects(foreseen.predicted_by_kind(self.result))
        checkpoints = self.checkpoints()
        with self.stage("train"), self.steps() as lines:
            trained = loop.train(
                self.adapted,
                self.tokens,
                self.config.train,
                pad_id=self.pad_id,
                seed=self.config.seed,
                meter=self.meter,
                log=partial(self.log_step, lines),
                validate=self.validation(),
                checkpoints=checkpoints,
                stop_at=self.stop_at,
                prune=self.prune(),
            )
        self.note_stop(trained)
        counts = parts.count(self.adapted)
        self.info |= {"trainable_parameters": counts.trainable, "total_parameters": counts.total}
        self.info |= train_info(trained) | train_cost(trained)
        foreseen.count_flops(
            self.result, flops, length.total_steps(self.config.train, len(self.tokens)), self.meter.device
        )

    def note_stop(self, trained: run.Trained) -> None:
        """Note in the record whether a validation ended the training before its last step."""
        if trained.stopped is None:
            return
        pruning = self.trial.pruning if trained.stopped == rungs.PRUNED else None
        metric = pruning.metric if pruning else self.config.train.best_metric
        self.stopped_early = True
        self.result.run_info["stopped"] = rungs.stop(self.place, trained.stopped, trained.steps, metric)

    def prune(self) -> run.Prune | None:
        """The function that decides after a validation whether a search prunes the trial; None without a search."""
        return None if self.trial.pruning is None else pruning.verdict(self.trial.pruning)

    def checkpoints(self) -> checkpoint.Checkpoints:
        """The checkpoints of the training, which continues from the newest one."""
        trial, since = self.trial, faults.right_since(self.trial.tree)
        trainings = [trial.training, *([trial.earlier.training] if trial.earlier else [])]
        stamps = [checkpoint.stamp(training, self.meter.device, since) for training in trainings]
        place = self.place / store.CHECKPOINTS
        found = checkpoint.Checkpoints(place, stamps[0], self.place / record.STEPS, also=stamps[1:])
        if self.rows_lost():
            found.clear()
        self.result.run_info["resumed"] = resumed = found.find()  # the step; 0: from the beginning
        if resumed:
            self.attempts.resume(found.earlier, found.earlier_memory)
        if found.trained is None:
            self.kept.forget()  # kept evaluations are of other weights
        found.check = self.check_claim
        found.seconds, found.memory = self.attempts.seconds, self.attempts.memory
        return found

    def log_step(self, lines: TextIO, row: dict[str, Any]) -> None:
        """Add a row to steps.jsonl, which ``lines`` is."""
        self.check_claim()
        log_step(lines, self.observer, row)

    def rows_lost(self) -> bool:
        """Whether the lines of steps.jsonl up to a checkpoint are damaged: then the training starts anew."""
        try:
            record.read_lines(self.place / record.STEPS, record.STEP, whole=False)
        except Unreadable as error:
            log.warning("%s; the training begins anew", error)
            return True
        return False

    def steps(self) -> TextIO:
        """The trial's steps.jsonl, opened for appending."""
        file = self.place / record.STEPS
        return file.open("a", encoding="utf-8") if self.result.run_info["resumed"] else file.open("w", encoding="utf-8")

    def keep(self) -> Answers | None:
        """Time and profile the trained model; its losses on a batch, if the saved model is compared with them."""
        config = self.config
        if config.inference:
            self.time_inference()
        answers = self.answers() if config.adapter.save and config.adapter.check else None
        if config.profiler:
            self.profile()
        return answers

    def compare(self, answers: Answers | None) -> None:
        """Load the saved adapter and merge it, and compare the losses of both with the trained model's."""
        if answers is not None:
            self.check(answers)
            if self.config.adapter.merge and self.config.method:
                self.merge(answers)

    def validation(self) -> Callable[[], dict[str, float]] | None:
        """Loss on the validation rows, and the evaluations that validate, each on its validation rows."""
        trial, rows, adapted, tokenizer = self.trial, self.rows.validation, self.adapted, self.tokenizer
        if not rows:
            return None
        tokens = build.training_tokens(trial, tokenizer, rows)
        examples_by_name = {
            name: build.validation_examples(trial, name, self.rows, tokenizer) for name in trial.config.eval
        }

        def validate() -> dict[str, float]:
            adapted.eval()
            scores = {"loss": likelihood.mean_loss(adapted, tokens, pad_id=self.pad_id)}
            for name, examples in examples_by_name.items():
                if examples is None:
                    continue
                found = build.evaluator(trial, name)(adapted, tokenizer, examples).scores
                scores |= {f"{name}.{metric}": score.value for metric, score in found.items()}
            return scores

        return validate

    def judge(self) -> None:
        """Record the validation of the rung at which the trial stops; the test rows are not used."""
        assert self.stop_at is not None
        self.info["validation"] = rungs.validated(self.place, self.stop_at)
        self.result.run_info["rung"] = rungs.rung(self.config.halving, self.place, self.stop_at)

    def evaluate(self) -> None:
        self.result.run_info[record.JUDGED] = evaluation_evaluate.JUDGING_VERSION
        for name, test in self.tests.items():
            self.result.eval_info[name] |= self.kept.find(name, test) or self._evaluate(name, test)

    def _evaluate(self, name: str, test: list[Example]) -> dict[str, Any]:
        """Evaluate the model; results are written to the disk at once, so that a later attempt can use them."""
        with self.stage("eval") as own, graphs.allowed_if(self.config.train.capture is Capture.auto):
            evaluation = build.evaluator(self.trial, name)(self.adapted, self.tokenizer, test)
        self.check_claim()
        cost = {key: getattr(own, key) for key in COST}
        found: dict[str, Any] = record.plain(evaluation.scores) | evaluation.facts | cost
        record.write_lines(self.place / "predictions" / f"{name}.jsonl", evaluation.predictions)
        self.kept.keep(name, test, found, packed="packed_with" in self.result.run_info)
        return found

    def score_scaled(self) -> None:
        """The scores of the adapter at fractions of its scale, if an evaluation sets them."""
        roles = {name: node.get("role", Role.target.value) for name, node in self.config.eval.items()}
        if not self.config.adapter.scales or set(roles.values()) != {role.value for role in Role}:
            return
        if reason := scaled.unscalable(self.adapted):
            log.warning("scored at no fraction of its scale: %s", reason)
            self.info["scales_refused"] = reason
            return
        self.info["scales"] = rows = list[dict[str, Any]]()
        with self.stage("scales"):
            for scale in sorted(set(self.config.adapter.scales)):
                with scaled.scaled(self.adapted, scale):
                    for name, test in self.tests.items():
                        found = build.evaluator(self.trial, name)(self.adapted, self.tokenizer, test)
                        metric = found.facts.get(record.HEADLINE) or next(iter(found.scores))
                        score = record.plain(found.scores[metric])
                        rows.append({"scale": scale, "eval": name, "role": roles[name], "metric": metric, **score})

    def save(self) -> None:
        """Save the trained weights, if the configuration says so."""
        if self.config.adapter.save:
            with self.stage("save"):
                self.info["adapter_bytes"] = models_saved.save(self.adapted, self.place / store.ADAPTER)

    def time_inference(self) -> None:
        saved = self.place / store.ADAPTER if self.config.adapter.save else self.config.adapter.path
        # After full fine-tuning both models have the same operations, and so the same times.
        variants = {"base": self.bare, "adapted": self.adapted} if self.config.method else {"base": self.adapted}
        with self.stage("inference"):
            timed = build.inference_benchmark(self.trial)(variants, self.tokenizer, saved=saved and Path(saved))
        self.bare = None
        self.result.generation_info = timed.info
        record.write_lines(self.place / "generation.jsonl", timed.runs)

    def answers(self) -> Answers:
        """A batch and the trained model's losses on it, with which the saved model is compared."""
        probe = batches.collate(self.tokens[: self.config.train.batch_size], self.pad_id).to(self.meter.device)
        with torch.no_grad():
            return probe, losses.answer_losses(self.adapted, probe)

    def profile(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Profile some further steps, whose weights are thrown away.

        That this fails is a fact of the record, as the trial itself has succeeded.
        """
        with self.stage("profile"):
            try:
                prepare()
                with compiled.compile_once():
                    found = build.profiler(self.trial)(self._further_steps, self.place / "profile", self.meter.device)
                found |= self._sizes(self.profiled_steps) if self.profiled_steps else {}
            except Exception as error:
                store.raise_unwritable(error)
                log.exception("the trial cannot be profiled")
                found = {"error": record.one_line(error)}
        self.info.setdefault("profile", {})[self.trial.choices["profiler"]] = found

    def _sizes(self, steps: int) -> dict[str, float]:
        """The padded tokens of a step: the median of ``steps`` typical steps, and the median of the trial's steps."""
        rows, config, seed = self.tokens, self.config.train, self.config.seed
        runs = length.typical_steps(rows, config, seed, steps), length.steps_of(rows, config, seed)
        few, all_of = (statistics.median(length.padded_tokens(step, rows, config) for step in run) for run in runs)
        if abs(few / all_of - 1) > MAX_STEP_SIZE_DIFFERENCE:
            log.warning("the profiled steps have %.0f padded tokens, those of the trial %.0f (medians)", few, all_of)
        return {"step_tokens": few, "trial_step_tokens": all_of}

    def _further_steps(self, steps: int, after_step: Callable[[], None]) -> None:
        self.profiled_steps = steps
        self._steps(steps, Meter(self.meter.device), after_step)

    def _steps(self, steps: int, meter: Meter, after_step: Callable[[], None] | None = None) -> Trained:
        """Run further steps, whose sizes are distributed as those of the trial."""
        config = dataclasses.replace(self.config.train, steps=steps, epochs=None, keep_best=False, log_every=steps)
        return loop.train(
            self.adapted,
            self.tokens,
            config,
            pad_id=self.pad_id,
            seed=self.config.seed,
            meter=meter,
            log=lambda row: None,
            after_step=after_step,
            order=length.typical_steps(self.tokens, self.config.train, self.config.seed, steps),
        )

    def resume(self) -> None:
        """The trained model of a finished trial; if its adapter was not kept, an untrained one of the same size."""
        self.load()
        self.read()
        if any((self.place / store.ADAPTER).glob("*.safetensors")):
            self._restore(self.place / store.ADAPTER)
        else:
            self._attach()

    def measure(self) -> None:
        """Measure the step of a packed trial alone, on some further steps whose weights are discarded."""
        with self.stage("load"):
            self.base = build.load_base(self.trial, self.tokenizer, self.meter.device)
        self._attach()
        with self.stage("train"):
            trained = self._steps(MEASURED_STEPS, self.meter)
        cost = train_cost(trained)
        del cost["train_seconds"]  # was not measured for all of its steps
        self.info |= cost | {"measured_steps": MEASURED_STEPS}
        self.let_go()

    def let_go(self) -> None:
        del self.base, self.adapted
        self.bare = None

    def check(self, answers: Answers) -> None:
        with self.stage("reload"):
            self.info |= reload_adapter(self.trial, self.place, self.tokenizer, *answers)

    def merge(self, answers: Answers) -> None:
        with self.stage("merge"):
            self.info |= merge_adapter(self.trial, self.place, self.tokenizer, *answers)
