"""Result files of PEFT's method comparison on MetaMathQA: theirs as a study of ours, our trials as files of theirs.

Where the two mean different things by a name, ours are kept apart: their ``train_time`` includes validation and test
(``train_info.published_train_seconds``), the sum of their steps is our ``train_seconds``; their memory is the peak
that was reserved in the whole run, its generation included, as no other is known.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from peftsweep import config as configuration
from peftsweep import experiment, metrics, record, study
from peftsweep.errors import InputError
from peftsweep.reading import NUMBER, TEXT, Unreadable, check, fault, read_json, usable
from peftsweep.record import STEPS, Result, Status

STUDY = "peft_comparison"  # where theirs go unless a folder is named
TEST_ROWS, FORGETTING_ROWS = 1319, 100  # of GSM8K's test split; of the text they look at for forgetting
RESULTS, CANCELLED = "results", "cancelled_results"
STATUS = {"success": Status.success, "failed": Status.failed, "canceled": Status.cancelled}
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
QUANTS = {"int8": "8bit", "int4": "4bit"}
SCORE = "gsm8k.accuracy"
# Of a LoRA, by which its variants have names of their own here.
VARIANTS = {"use_dora": "dora", "use_rslora": "rslora", "kasa_config": "kasa"}
LORA_OPTIMIZERS = {"lora-fa": "lora_fa", "lora+": "lora_plus", "riemannian": "riemannian"}
# What their processing turns into integers, and cannot do without.
INTEGERS = ("file_size", "num_trainable_params", "accelerator_memory_max")


def _metrics(value: Any, key: str) -> str | None:
    """A row of their log: of a training with its loss and memory, or the last one, of the test."""
    trained = isinstance(value, dict) and "train time" in value
    return fault(value, TRAINED if trained else {"*": NUMBER}, key)


TRAINED = dict.fromkeys(
    ("step", "train loss", "tokens / sec", "elapsed time", "mem allocated avg", "valid accuracy", "train time"), NUMBER
) | {"eval time": NUMBER, "*": NUMBER}
# What is read of one of their result files.
THEIRS = {
    "run_info": {
        "created_at": str,
        "total_time": NUMBER,
        "experiment_name": str,
        "peft_branch": TEXT,
        "error_msg": str,
        "train_config": {
            "model_id": str,
            "optimizer_type": str,
            "dtype": str,
            "batch_size_eval": int,
            "generation_kwargs": dict,
        },
        "peft_config": (dict, type(None)),
    },
    "train_info": {
        "accelerator_memory_max": NUMBER,
        "accelerator_memory_reserved_avg": NUMBER,
        "accelerator_memory_reserved_99th": NUMBER,
        "train_time": NUMBER,
        "file_size": NUMBER,
        "num_trainable_params": NUMBER,
        "num_total_params?": NUMBER,
        "status": frozenset(STATUS),
        "metrics": [_metrics],
    },
    "meta_info": {
        "package_info": {"*": TEXT},
        "system_info": {"*": object},
        "model_info": {"sha?": TEXT, "created_at?": TEXT},
        "dataset_info": dict,
    },
}


# ---- theirs ----------------------------------------------------------------------------------------


def from_peft(source: Path, place: Path | None = None) -> Path:
    """Write every result file below ``source`` as a trial of the study ``place``, and give its folder.

    Raises:
        InputError: there is no result file.
    """
    folder = study.folder(STUDY) if place is None else study.folder(place.name) if len(place.parts) == 1 else place
    files = sorted(source.expanduser().rglob("*.json"))
    found = {file: content for file in files if (content := usable(partial(_result_file, file))) is not None}
    if not found:
        raise InputError(f"--from-peft {source}: no folder below it holds a result file of PEFT's comparison")
    for file, content in found.items():
        result = usable(partial(_imported, content, folder.name, file))
        if result is None:
            continue
        trial = folder / result.trial
        if (held := study.result(trial)) and held.run_info["created_at"] > result.run_info["created_at"]:
            continue  # of another checkout, and newer
        record.write_lines(trial / STEPS, _logged(content["train_info"]["metrics"]))
        result.write(trial)
    return folder


def _result_file(file: Path) -> dict[str, Any] | None:
    """The content of a result of the comparison on MetaMathQA; None of a file of another kind.

    Raises:
        Unreadable: the file is damaged, or a result that lacks something.
    """
    content = read_json(file, foreign=True)
    if not isinstance(content, dict) or len(content.keys() & THEIRS.keys()) < 2:
        return None  # such as an adapter_config.json
    check(content, {"run_info": {"train_config": dict}}, str(file))
    if "query_template" not in content["run_info"]["train_config"]:
        return None  # of another comparison of theirs
    check(content, THEIRS, str(file))
    return content


def _imported(content: Mapping[str, Any], name: str, file: Path) -> Result:
    """Raises: Unreadable: the parameters of the file are none of the comparison's."""
    try:
        result = imported(content, name, str(file))
    except InputError as error:
        raise Unreadable(f"{file}: {error}") from None
    if not study.is_plain(result.trial):
        raise Unreadable(f"{file}: run_info.experiment_name: no folder can be called so")
    return result


def imported(content: Mapping[str, Any], name: str, file: str) -> Result:
    """A result file as a record of the study called ``name``."""
    run, trained, about = content["run_info"], content["train_info"], content["meta_info"]
    parameters, method = run["train_config"], _without_origin(run["peft_config"])
    identity = configuration.content_hash([run["experiment_name"], parameters, method])
    rows = [row for row in trained["metrics"] if "train time" in row]
    last = trained["metrics"][-1] if trained["metrics"] else {}
    seconds = sum(row["train time"] for row in rows)
    tokens = last.get("train total tokens")
    status = STATUS[trained["status"]]
    if status is not Status.success and "out of memory" in run["error_msg"].lower():
        status = Status.oom
    return Result(
        run_info={
            "trial": f"{run['experiment_name'].replace('/', '--')}-{identity}",
            "labels": [run["experiment_name"]],
            "study": name,
            "identity": identity,
            "created_at": run["created_at"],
            "category": "main" if run["peft_branch"] == "main" else "test",
            "imported_from": file,
            "status": status.value,
            "error": _error(run["error_msg"]),
            "total_seconds": run["total_time"],
        },
        choices=_choices(run["peft_config"], parameters),
        config=_config(method, parameters, name) | {"label": run["experiment_name"]},
        train_info={
            "trainable_parameters": trained["num_trainable_params"],
            "total_parameters": trained.get("num_total_params"),
            "adapter_bytes": trained["file_size"],
            "steps": last.get("step"),
            "tokens": tokens,
            "final_loss": last.get("train loss"),
            "train_seconds": seconds,
            "published_train_seconds": trained["train_time"],
            "validate_seconds": sum(row["eval time"] for row in rows),
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
        },
        memory={
            "train": {
                "reserved_peak": trained["accelerator_memory_max"],
                "reserved_mean": trained["accelerator_memory_reserved_avg"],
                "reserved_p99": trained["accelerator_memory_reserved_99th"],
                "allocated_mean": statistics.fmean(row["mem allocated avg"] for row in rows) if rows else None,
            }
        },
        eval_info=_scores(last),
        meta_info=_about(about, run),
    )


def _without_origin(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A method's options, with its ``peft_type`` and without what says where it came from or is not made use of."""
    options = (config or {}).items()
    return {key: value for key, value in options if value is not None and key not in experiment.ORIGIN[1:]}


def _choices(method: Mapping[str, Any] | None, parameters: Mapping[str, Any]) -> dict[str, str]:
    base = str(parameters["model_id"])
    return {
        "model": _presets().get(base, base.rpartition("/")[2]),
        "method": _method_name(method or {}, str(parameters["optimizer_type"]).lower()),
        "quant": QUANTS.get(parameters["dtype"], "none"),
        "dataset": "metamath",
        "targets": "default",
        "train": "peft_comparison",
    }


@cache
def _presets() -> dict[str, str]:
    """The names that models of the hub have here."""
    files = sorted((Path(configuration.conf_dir()) / "model").glob("*.yaml"))
    return {str(OmegaConf.select(OmegaConf.load(file), "name_or_path")): file.stem for file in files}


def _method_name(method: Mapping[str, Any], optimizer: str) -> str:
    name = str(method.get("peft_type", "full")).lower()
    if name != "lora":
        return name
    if isinstance(method.get("init_lora_weights"), str):
        return str(method["init_lora_weights"]).lower()
    variants = [variant for option, variant in VARIANTS.items() if method.get(option)]
    return [*variants, LORA_OPTIMIZERS.get(optimizer, name)][0]


def _config(method: dict[str, Any], parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    keys = experiment.translated(parameters, "--from-peft").keys
    said: dict[str, Any] = {"study": name, "method": method, "model": {"name_or_path": parameters["model_id"]}}
    tree = OmegaConf.create(said | {"dataset": {"name": "metamath"}})
    for key, value in keys.items():
        if not key.startswith(experiment.EVALUATIONS):
            OmegaConf.update(tree, key, value)
    tree.eval = {"gsm8k": {"batch_size": parameters["batch_size_eval"], **parameters["generation_kwargs"]}}
    config: dict[str, Any] = OmegaConf.to_container(tree)  # type: ignore[assignment]
    return config


def _scores(last: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Test accuracy with its standard error, a proportion's, and the loss gained on unrelated text."""
    scores: dict[str, dict[str, Any]] = {}
    if (accuracy := last.get("test accuracy")) is not None:
        scores["gsm8k"] = {"accuracy": record.plain(metrics.proportion(round(accuracy * TEST_ROWS), TEST_ROWS))}
    if (forgetting := last.get("forgetting")) is not None:
        scores["forgetting"] = {"loss_increase": {"value": forgetting, "stderr": None, "n": FORGETTING_ROWS}}
    return scores


def _about(about: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    packages = about["package_info"]
    found = {
        name: {"version": packages[f"{name}-version"], "commit": packages.get(f"{name}-commit-hash")}
        for name in PACKAGES
        if f"{name}-version" in packages
    }
    found.setdefault("peft", {})["branch"] = run["peft_branch"]
    system = dict(about["system_info"])
    return {
        "packages": found,
        "torch": {"version": packages.get("torch-version"), "gpus": [system.pop("accelerator", None)]},
        "system": system,
        "model_sha": about["model_info"].get("sha"),
        "model_created_at": about["model_info"].get("created_at"),
        "dataset": about["dataset_info"],
    }


def _error(message: str) -> dict[str, str] | None:
    if not message:
        return None
    kind, colon, rest = message.partition(": ")
    known = colon and kind.isidentifier()
    return {"type": kind if known else "Error", "message": rest if known else message, "stage": "train"}


def _logged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of their log as lines of steps.jsonl."""
    lines = []
    for row in rows:
        if "train time" in row:
            line = {"step": row["step"], "loss": row["train loss"], "tokens_per_second": row["tokens / sec"]}
            line |= {"seconds": row["elapsed time"], "memory_allocated": row["mem allocated avg"]}
            lines.append(line | {"validation_gsm8k.accuracy": row["valid accuracy"]})
    return lines


# ---- ours ------------------------------------------------------------------------------------------


def to_peft(results: Sequence[Result], folder: Path) -> list[str]:
    """Write trials as result files into ``folder``, their comparison's MetaMathQA; gives what is to be said of it.

    A trial that succeeded goes into ``results/``, any other into ``cancelled_results/``, as theirs do.
    """
    said, names = [], set()
    for result in results:
        content = exported(result)
        facts = content["train_info"] | content["train_info"]["metrics"][-1]
        missing = [name for name in (*INTEGERS, "train samples", "train total tokens") if facts[name] is None]
        label = content["run_info"]["experiment_name"]
        if result.status is Status.success and missing:
            said.append(f"left out: {label}: its record has no {', no '.join(missing)}")
            continue
        name = label.replace("/", "--")
        if result.status is not Status.success or name in names:
            name += f"--{result.run_info['created_at'].replace(':', '-')}"
        names.add(name)
        place = folder / (RESULTS if result.status is Status.success else CANCELLED)
        record.write_json(place / f"{name}.json", content)
    written = len(results) - len(said)
    return [*said, f"wrote {written} {'trial' if written == 1 else 'trials'} to {folder}"]


def exported(result: Result) -> dict[str, Any]:
    """A trial as a result file. What it cannot say of ours stands under ``run_info.peftsweep``."""
    run, trained, config = result.run_info, result.train_info, result.config
    score = _score_name(result.eval_info)
    resident = _of_train(result, "reserved_peak") is None
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


def _of_train(result: Result, name: str) -> Any:
    return result.memory.get("train", {}).get(name)


def _memory(result: Result, name: str) -> int | None:
    """What was reserved; without a device how far the process grew, the one figure that is known then."""
    value = _of_train(result, name)
    if value is None and (resident := _of_train(result, "rss_peak")) is not None:
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
    for line in record.usable_lines((result.folder or Path()) / STEPS, record.STEP, whole=False):
        loss = line.get("loss", loss)
        if f"validation_{score}" in line:
            said = {"valid accuracy": line[f"validation_{score}"], "train loss": loss}
            rows.append({"step": line["step"], **said, "train samples": _samples(result, line["step"])})
    return rows


def _parameters(result: Result) -> dict[str, Any]:
    """The training parameters by their names."""
    config, train = result.config, result.config.get("train", {})
    flat = record.flat(config)
    said = {theirs: flat.get(ours) for theirs, ours in experiment.KEYS.items()}
    kind = str(train.get("optimizer", "")).rpartition(".")[2]
    named = {path.rpartition(".")[2]: name for name, path in experiment.OPTIMIZERS.items()}
    judged = (config.get("eval") or {}).get("gsm8k", {})
    quantised = {ours: theirs for theirs, ours in QUANTS.items()}.get(result.choices.get("quant", "none"))
    return said | {
        "model_id": config["model"]["name_or_path"],
        "dtype": quantised or said["dtype"],
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
