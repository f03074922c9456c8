"""Our trials as result files of PEFT's method comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftsweep.analysis.interchange import PACKAGES, QUANTS
from peftsweep.config import experiment_keys
from peftsweep.errors import first_line, printable
from peftsweep.study import record
from peftsweep.study.record import STEPS, Result, Status

RESULTS, CANCELLED = "results", "cancelled_results"
SCORE = "gsm8k.accuracy"
# What their processing turns into integers, and cannot do without.
INTEGERS = ("file_size", "num_trainable_params", "accelerator_memory_max")


# ---- ours ------------------------------------------------------------------------------------------


def to_peft(results: Sequence[Result], folder: Path) -> list[str]:
    """Write trials as result files into ``folder``, their comparison's MetaMathQA; returns lines to print.

    A trial that succeeded goes into ``results/``, any other into ``cancelled_results/``, as theirs do.
    """
    messages, names = [], set()
    for result in results:
        try:
            content = exported(result)
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # of a record that somebody has edited
            reason = f"its record holds something of a wrong type ({first_line(error)})"
            messages.append(printable(f"left out: {result.run_info['labels'][0]}: {reason}"))
            continue
        facts = content["train_info"] | content["train_info"]["metrics"][-1]
        missing = [name for name in (*INTEGERS, "train samples", "train total tokens") if facts[name] is None]
        label = content["run_info"]["experiment_name"]
        if result.status is Status.success and missing:
            messages.append(f"left out: {label}: its record has no {', no '.join(missing)}")
            continue
        name = label.replace("/", "--")
        if result.status is not Status.success or name in names:
            name += f"--{result.run_info['created_at'].replace(':', '-')}"
        names.add(name)
        place = folder / (RESULTS if result.status is Status.success else CANCELLED)
        record.write_json(place / f"{name}.json", content)
    written = len(results) - len(messages)
    return [*messages, f"wrote {written} {'trial' if written == 1 else 'trials'} to {folder}"]


def exported(result: Result) -> dict[str, Any]:
    """A trial as a result file. What it cannot say of ours stands under ``run_info.peftsweep``."""
    run, trained, config = result.run_info, result.train_info, result.config
    score = _score_name(result.eval_info)
    resident = _training_score(result, "reserved_peak") is None
    label = run["labels"][0]
    return {
        "run_info": {
            "created_at": run["created_at"],
            "total_time": run.get("total_seconds"),
            "experiment_name": label if "/" in label else f"{result.choices['method']}/{label}",
            "peft_branch": ((result.meta_info.get("packages") or {}).get("peft") or {}).get("branch"),
            "train_config": _parameters(result),
            "peft_config": _peft_config(config.get("method") or {}),
            "error_msg": "" if result.error is None else f"{result.error['type']}: {result.error['message']}",
            "peftsweep": {
                "trial": result.trial,
                "test_accuracy": score,
                "accelerator_memory": "resident memory of the process" if resident else "reserved in training",
                "train_time": "as published" if "published_train_seconds" in trained else "steps alone, without tests",
            },
        },
        "train_info": {
            "accelerator_memory_reserved_avg": _memory(result, "reserved_mean"),
            "accelerator_memory_max": _memory(result, "reserved_peak"),
            "accelerator_memory_reserved_99th": _memory(result, "reserved_p99"),
            "train_time": trained.get("published_train_seconds", trained.get("train_seconds")),
            "file_size": trained.get("adapter_bytes"),
            "num_trainable_params": trained.get("trainable_parameters"),
            "num_total_params": trained.get("total_parameters"),
            "status": "success" if result.status is Status.success else "canceled",
            "metrics": [*_validations(result, score), _last(result, score)],
        },
        "meta_info": _their_meta_info(result),
    }


def _score_name(scores: Mapping[str, Any]) -> str | None:
    """``<eval>.accuracy``: GSM8K's, else the first."""
    known = [f"{name}.accuracy" for name, found in scores.items() if "accuracy" in found]
    return SCORE if SCORE in known else next(iter(known), None)


def _training_score(result: Result, name: str) -> Any:
    return result.memory.get("train", {}).get(name)


def _memory(result: Result, name: str) -> int | None:
    """What was reserved; without a device how far the process grew, the one figure that is known then."""
    value = _training_score(result, name)
    if value is None and (resident := _training_score(result, "rss_peak")) is not None:
        value = resident - result.memory.get("start", {}).get("rss", 0)
    return None if value is None else round(value)


def _last(result: Result, score: str | None) -> dict[str, Any]:
    trained = result.train_info
    forgetting = result.eval_info.get("forgetting", {})
    gained = _value(forgetting, "loss_increase")
    if gained is None and (before := _value(forgetting, "base_loss")) is not None:
        after = _value(forgetting, "loss")
        gained = None if after is None else after - before
    evaluation, _, metric = (score or "").partition(".")
    return {
        "step": trained.get("steps"),
        "test accuracy": _value(result.eval_info.get(evaluation, {}), metric),
        "train loss": trained.get("final_loss"),
        "train samples": _samples(result, trained.get("steps")),
        "train total tokens": trained.get("tokens"),
        "forgetting": gained,
    }


def _samples(result: Result, steps: int | None) -> int | None:
    train = result.config.get("train", {})
    return None if steps is None else steps * int(train.get("batch_size", 1)) * int(train.get("accumulation", 1))


def _value(scores: Mapping[str, Any], metric: str) -> float | None:
    score = scores.get(metric)
    return score.get("value") if isinstance(score, Mapping) else None


def _validations(result: Result, score: str | None) -> list[dict[str, Any]]:
    """Their rows of the training: one a validation of ours, with the loss last logged before it."""
    rows, loss = [], None
    for line in record.usable_lines((result.folder or Path()) / STEPS, record.STEP):
        loss = line.get("loss", loss)
        if f"validation_{score}" in line:
            validation = {"valid accuracy": line[f"validation_{score}"], "train loss": loss}
            rows.append({"step": line["step"], **validation, "train samples": _samples(result, line["step"])})
    return rows


def _parameters(result: Result) -> dict[str, Any]:
    """The training parameters by their names."""
    config, train = result.config, result.config.get("train", {})
    flat = record.flat(config)
    parameters = {theirs: flat.get(ours) for theirs, ours in experiment_keys.KEYS.items()}
    kind = str(train.get("optimizer", "")).rpartition(".")[2]
    named = {path.rpartition(".")[2]: name for name, path in experiment_keys.OPTIMIZERS.items()}
    judged = (config.get("eval") or {}).get("gsm8k", {})
    quantised = {ours: theirs for theirs, ours in QUANTS.items()}.get(result.choices.get("quant", "none"))
    return parameters | {
        "model_id": config["model"]["name_or_path"],
        "dtype": quantised or parameters["dtype"],
        "optimizer_type": named.get(kind, kind),
        "optimizer_kwargs": {
            "lr": train.get("learning_rate", 0) * train.get("learning_rate_scale", 1),
            "weight_decay": train.get("weight_decay"),
            **(train.get("optimizer_kwargs") or {}),
        },
        "lr_scheduler": "cosine" if train.get("schedule") == "cosine" else None,
        "use_amp": train.get("autocast") is not None,
        "compile": train.get("compile", "none") != "none",
        "batch_size_eval": judged.get("batch_size"),
        "generation_kwargs": {key: judged[key] for key in ("max_length", "max_new_tokens") if key in judged},
        "eval_steps": int(every) if (every := str(train.get("eval_every"))).isdecimal() else None,
        "init_kv_cache_prefix": (config.get("method_setup") or {}).get("text"),
    }


def _peft_config(method: Mapping[str, Any]) -> dict[str, Any] | None:
    if not method:
        return None
    options = {key: value for key, value in method.items() if key != "_target_"}
    if "peft_type" in options:
        return options
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # takes seconds, which a table has not

    name = str(method.get("_target_", "")).rpartition(".")[2]
    kinds = [kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__name__ == name]
    return {"peft_type": kinds[0] if kinds else name, **options}


def _their_meta_info(result: Result) -> dict[str, Any]:
    about = result.meta_info
    packages = {name: (about.get("packages") or {}).get(name) or {} for name in PACKAGES}
    versions = {f"{name}-version": package.get("version") for name, package in packages.items()}
    gpus = (about.get("torch") or {}).get("gpus") or ["cpu"]
    return {
        "model_info": {
            "sha": about.get("model_sha") or result.config["model"].get("revision"),
            "created_at": about.get("model_created_at"),
        }
        | (about.get("model") or {}),
        "dataset_info": about.get("dataset")
        or {
            (result.config.get("dataset") or {}).get("name"): {
                "sha": about.get("dataset_sha"),
                "created_at": about.get("dataset_created_at"),
            }
        },
        "package_info": versions | {f"{name}-commit-hash": package.get("commit") for name, package in packages.items()},
        "system_info": (about.get("system") or {}) | {"accelerator": gpus[0]},
        "pytorch_info": f"torch {versions['torch-version']}",
    }
