"""Result files of PEFT's method comparison on MetaMathQA as a study of ours.

Where the two mean different things by a name, ours are kept apart: their ``train_time`` includes the evaluation on the
test rows and what lies between steps, but no validation (``train_info.published_train_seconds``); the sum of their
steps is our ``train_seconds``, if the log covers all steps. Their memory is the peak that was reserved in the whole
run, its generation included, as no other is known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from peftsweep.config import experiment, experiment_keys, fill
from peftsweep.config import identity as config_identity
from peftsweep.errors import InputError
from peftsweep.evaluation import metrics
from peftsweep.study import record, store
from peftsweep.study.reading import NUMBER, TEXT, Unreadable, check, fault, read_json, usable
from peftsweep.study.record import STEPS, Result, Status

STUDY = "peft_comparison"  # where theirs go unless a folder is named
TEST_ROWS, FORGETTING_ROWS = 1319, 100  # of GSM8K's test split; of the text they look at for forgetting
ROUNDED = 5e-5  # by which an accuracy in a file may be rounded
STATUS = {"success": Status.success, "failed": Status.failed, "canceled": Status.cancelled}
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
QUANTS = {"int8": "8bit", "int4": "4bit"}
# Of a LoRA, by which its variants have names of their own here.
VARIANTS = {"use_dora": "dora", "use_rslora": "rslora", "kasa_config": "kasa"}
LORA_OPTIMIZERS = {"lora-fa": "lora_fa", "lora+": "lora_plus", "riemannian": "riemannian"}


def _metrics(value: Any, key: str) -> str | None:
    """A row of their log: of a training with its loss and memory, or the last one, of the test."""
    trained = isinstance(value, dict) and "train time" in value
    if found := fault(value, TRAINED if trained else {"*": NUMBER}, key):
        return found
    shares = {name: value[name] for name in ("valid accuracy", "test accuracy") if value.get(name) is not None}
    return next((f"{key}.{name}: must be from 0 to 1" for name, share in shares.items() if not 0 <= share <= 1), None)


TRAINED: dict[str, tuple[type, ...]] = dict.fromkeys(("train loss", "valid accuracy", "*"), NUMBER) | dict.fromkeys(
    ("step", "tokens / sec", "elapsed time", "mem allocated avg", "train time", "eval time"), (int, float)
)
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
    folder = store.folder(STUDY) if place is None else store.folder(place.name) if len(place.parts) == 1 else place
    files = sorted(source.expanduser().rglob("*.json"))
    found = {file: content for file in files if (content := usable(partial(_result_file, file))) is not None}
    if not found:
        raise InputError(f"--from-peft {source}: no folder below it holds a result file of PEFT's comparison")
    for file, content in found.items():
        result = usable(partial(_imported, content, folder.name, file))
        if result is None:
            continue
        trial = folder / result.trial
        if (held := store.result(trial)) and held.run_info["created_at"] > result.run_info["created_at"]:
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
    if not store.is_plain(result.trial):
        raise Unreadable(f"{file}: run_info.experiment_name: no folder can be called so")
    return result


def imported(content: Mapping[str, Any], name: str, file: str) -> Result:
    """A result file as a record of the study called ``name``."""
    run, trained, about = content["run_info"], content["train_info"], content["meta_info"]
    parameters, method = run["train_config"], _without_origin(run["peft_config"])
    identity = config_identity.content_hash([run["experiment_name"], parameters, method])
    rows = [row for row in trained["metrics"] if "train time" in row]
    last = trained["metrics"][-1] if trained["metrics"] else {}
    seconds = sum(row["train time"] for row in rows)
    logged = sum(row["tokens / sec"] * row["train time"] for row in rows)  # the tokens of the steps in these seconds
    whole = bool(rows) and rows[-1]["step"] == last["step"]  # else steps after the last validation are in no row
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
            "tokens": last.get("train total tokens"),
            "final_loss": last.get("train loss"),
            "train_seconds": seconds if whole else None,
            "published_train_seconds": trained["train_time"],
            "validate_seconds": sum(row["eval time"] for row in rows),
            "tokens_per_second": logged / seconds if seconds else None,
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


# Sets in PEFT, which writes them in any order: of two files with the same modules neither order is a setting.
UNORDERED = ("target_modules", "exclude_modules")


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
    files = sorted((Path(fill.conf_dir()) / "model").glob("*.yaml"))
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
    method = {k: sorted(v) if k in UNORDERED and isinstance(v, list) else v for k, v in method.items()}
    values: dict[str, Any] = {"study": name, "method": method, "model": {"name_or_path": parameters["model_id"]}}
    tree = OmegaConf.create(values | {"dataset": {"name": "metamath"}})
    for key, value in keys.items():
        if not key.startswith(experiment_keys.EVALUATIONS):
            OmegaConf.update(tree, key, value)
    tree.eval = {"gsm8k": {"batch_size": parameters["batch_size_eval"], **parameters["generation_kwargs"]}}
    config: dict[str, Any] = OmegaConf.to_container(tree)  # type: ignore[assignment]
    return config


def _scores(last: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Test accuracy with its standard error, a proportion's, and the loss gained on unrelated text.

    An accuracy that no number of GSM8K's test rows gives is of other rows, whose number the file does not say.
    """
    scores: dict[str, dict[str, Any]] = {}
    if (accuracy := last.get("test accuracy")) is not None:
        right = round(accuracy * TEST_ROWS)
        of_all = math.isclose(right, accuracy * TEST_ROWS, abs_tol=ROUNDED * TEST_ROWS)
        found = record.plain(metrics.proportion(right, TEST_ROWS)) if of_all else None
        scores["gsm8k"] = {"accuracy": found or {"value": accuracy, "stderr": None, "n": None}}
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
