"""Exit codes and errors of the commands."""

import errno
import functools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

MAX_NAMED = 5  # of many names, so many are in a message
SYNONYMS = {  # what other libraries and people call our keys and options, in small letters with _ for -
    "learning_rate": ("lr", "learningrate", "max_lr", "peak_lr"),
    "r": ("rank", "lora_r", "lora_rank", "lora_dim", "dim", "ranks"),
    "lora_alpha": ("alpha", "scaling"),
    "lora_dropout": ("dropout", "adapter_dropout"),
    "batch_size": (
        *("bs", "batch", "batchsize", "train_batch_size", "micro_batch_size", "mbs"),
        *("per_device_train_batch_size", "per_device_batch_size"),
    ),
    "accumulation": (
        *("grad_accum", "gradient_accumulation", "gradient_accumulation_steps", "accumulation_steps"),
        *("grad_acc", "grad_accumulation", "accumulate_grad_batches", "accumulate"),
    ),
    "checkpointing": (
        *("gradient_checkpointing", "use_gradient_checkpointing", "use_gc", "gc", "grad_checkpointing"),
        *("grad_ckpt", "activation_checkpointing"),
    ),
    "steps": ("max_steps", "num_steps", "train_steps", "iters", "max_iters", "num_iterations", "total_steps"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "epoch", "max_epochs"),
    "weight_decay": ("wd", "decay"),
    "clip": (
        *("max_grad_norm", "grad_clip", "gradient_clipping", "grad_norm_clip", "clip_grad_norm", "clip_grad"),
        *("grad_norm", "gradient_clip_val"),
    ),
    "optimizer": ("optim", "opt", "optimiser"),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "warmup": ("warmup_ratio", "warmup_steps", "num_warmup_steps", "lr_warmup"),
    "eval_every": (
        *("eval_steps", "eval_interval", "validate_every", "evaluation_strategy", "eval_strategy", "eval_freq"),
        *("val_check_interval", "evals_per_epoch"),
    ),
    "keep_best": ("load_best_model_at_end", "early_stopping", "save_best"),
    "best_metric": ("metric_for_best_model", "monitor"),
    "log_every": ("logging_steps", "log_interval", "log_every_n_steps"),
    "checkpoint_every": ("save_steps", "save_every", "save_strategy", "save_interval"),
    "compile": ("torch_compile",),
    "autocast": ("amp", "mixed_precision", "use_amp"),
    "max_length": (
        *("max_seq_length", "max_seq_len", "seq_len", "seq_length", "cutoff_len", "block_size", "max_len"),
        *("sequence_len", "context_length", "model_max_length"),
    ),
    "name_or_path": (
        *("model_name_or_path", "model_id", "name", "path", "pretrained", "base_model", "model_name", "model_path"),
        *("base_model_name_or_path", "checkpoint"),
    ),
    "dtype": ("torch_dtype", "precision", "bf16", "fp16"),
    "attn_implementation": ("attention", "attn", "flash_attention", "use_flash_attention_2"),
    "modules": ("target_modules", "lora_target_modules", "lora_target", "lora_modules"),
    "samples": ("limit", "num_samples", "max_samples", "n", "max_train_samples", "num_fewshot_samples"),
    "test_path": ("eval_path", "validation_path", "test_file", "eval_file", "validation_file", "eval_dataset"),
    "path": ("file", "data_path", "data_files", "train_file", "dataset_path", "train_path"),
    "train_fraction": ("val_set_size", "test_size", "test_split_size", "split_ratio"),
    "hub": ("repo", "repo_id", "dataset_name", "hub_id"),
    "hub_split": ("split",),
    "hub_config": ("subset", "config_name", "dataset_config_name"),
    "prompt": ("prompt_template", "prompt_column", "input_column", "question_column"),
    "answer": ("answer_template", "response_column", "target_column", "completion", "label_column"),
    "classes": ("labels", "label_names", "num_labels", "id2label"),
    "loss_on": ("train_on_inputs", "train_on_prompt", "completion_only_loss"),
    "seed": ("random_seed", "random_state", "seeds", "data_seed"),
    "study": ("output_dir", "run_name", "project", "experiment", "out", "output"),
    "label": ("run", "title", "tag"),
    "tracker": ("report_to", "logger"),
    "memory_limit": ("max_memory", "gpu_memory", "memory", "max_memory_mb"),
    "force": ("overwrite", "overwrite_output_dir", "rerun"),
    "dry_run": ("plan", "dryrun", "list"),
    "workers": ("n_jobs", "num_workers", "jobs", "n_workers", "parallel"),
    "quant": ("quantization", "quantisation", "bnb", "load_in_4bit", "load_in_8bit", "bits"),
    "method": ("peft", "peft_type", "adapter_type", "peft_method"),
    # options
    "4bit": ("nf4", "int4", "fp4", "bnb4", "bnb_4bit", "bnb_nf4", "4_bit", "load_in_4bit", "q4", "4", "four", "qlora"),
    "8bit": ("int8", "bnb8", "bnb_8bit", "8_bit", "llm.int8", "llm_int8", "load_in_8bit", "q8", "8"),
    "int8_torchao": ("torchao", "int8_weight_only", "int8wo"),
    "int8_quanto": ("quanto",),
    "fp8_torchao": ("float8", "fp8_e4m3", "float8_weight_only"),
    "none": ("fp32", "fp16", "bf16", "float16", "bfloat16", "float32", "16bit", "32bit", "no", "off", "full", "null"),
    "full": ("full_ft", "fft", "sft", "full_finetuning", "full_fine_tuning", "full_finetune", "finetune", "none"),
    "prefix_tuning": ("prefix",),
    "prompt_tuning": ("prompt", "soft_prompt"),
    "p_tuning": ("ptuning", "p_tuning_v1"),
    "ia3": ("ia_3", "ia^3", "(ia)^3"),
    "ln_tuning": ("layernorm", "layer_norm", "ln", "norm_tuning"),
    "lora_plus": ("lora+", "loraplus"),
    "rslora": ("rs_lora", "rank_stabilized_lora"),
    "all_linear": ("all", "linear", "every"),
    "qkvo": ("attention", "attn", "self_attention", "q_proj,k_proj,v_proj,o_proj"),
    "mlp": ("ffn", "ff", "feed_forward"),
    "llama3.2_1b": ("llama_1b", "llama3_1b", "llama_3.2_1b", "llama"),
    "llama3.2_3b": ("llama_3b", "llama3_3b", "llama_3.2_3b"),
    "bert_base": ("bert", "bert_base_uncased"),
    "roberta_base": ("roberta",),
    "gpt_neo_1.3b": ("gpt_neo", "gptneo"),
    "phi2": ("phi", "phi_2"),
    "opt_350m": ("opt",),
    "metamath": ("metamathqa", "meta_math", "math"),
    "commonsense_170k": ("commonsense", "commonsense170k"),
    "social_i_qa": ("siqa", "social_iqa"),
    "openbookqa": ("obqa", "openbook_qa"),
    "commonsense_qa": ("csqa", "commonsenseqa"),
    "file": ("csv", "json", "jsonl", "parquet", "local", "custom"),
    "chat": ("messages", "conversations", "chatml"),
    "sharegpt": ("share_gpt", "vicuna"),
    "oasst1": ("oasst", "openassistant", "open_assistant"),
    "wizard_evol": ("wizardlm", "evol_instruct", "wizard", "wizardlm_evol_instruct"),
    "tulu_sft": ("tulu", "tulu3", "tulu_3", "tulu_sft_mixture"),
    "e2e_nlg": ("e2e",),
    "exact_match": ("em", "accuracy", "acc"),
    "perplexity": ("ppl", "loss"),
    "lm_eval": ("harness", "lm_evaluation_harness", "lm_eval_harness"),
    "bfloat16": ("bf16", "bfloat"),
    "float16": ("fp16", "half", "f16"),
    "float32": ("fp32", "float", "single", "f32"),
    "constant": ("none", "flat"),
    "cosine": ("cos", "cosine_with_warmup"),
    "random": ("scratch", "none"),
}


# Errors of a path that is given and cannot be read, such as one in a folder of another user, or on a lost disk.
UNREADABLE_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENOTCONN)
EXIT_CODES = {
    0: "the command has done all its work",
    1: "a trial failed or ran out of memory",
    2: "wrong input, or the study cannot be written; one line says what",
    3: "a trial was not run, or not to its end: a limit, a deadline, an interrupt of that trial alone",
    130: "interrupted; the same command continues",
}
MAX_LISTED = 80  # of the known names, in a message
MAX_WRITTEN_OUT = 10  # values of a range that are written out
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FROM_TO = re.compile(rf"({NUMBER})\s*(?:-|\u2013|\.{{2,3}}|:|to)\s*({NUMBER})")
SEVERAL_NUMBERS = re.compile(rf"[\[({{]?\s*{NUMBER}(?:\s*[\s,;|]\s*{NUMBER})+\s*[\])}}]?")


class InputError(ValueError):
    """Wrong input. The message is one line that names the key and the allowed values; exit code 2."""


def check_platform() -> None:
    """Refuse systems on which peftsweep does not run, and warn of untested ones. Called before any heavy import.

    Raises:
        InputError: peftsweep does not run here, or the working folder was removed.
    """
    check_working_folder()
    if sys.platform == "win32":
        raise InputError("Windows is not supported: workers need Unix processes and signals; use WSL")
    if sys.platform != "linux":
        print(f"peftsweep: not tested on {sys.platform}, only on Linux; trials run on the CPU", file=sys.stderr)


def check_working_folder() -> None:
    """Refuse a working folder that was removed or must not be entered, in which libraries end the process.

    Raises:
        InputError: there is no such folder.
    """
    try:
        os.stat(os.getcwd())
    except OSError as error:
        raise InputError(
            f"the working folder cannot be used ({error.strerror}); cd to a folder that is there"
        ) from None


def unreadable(error: BaseException) -> str | None:
    """The line about a path that the system does not let us read; None for another error."""
    if isinstance(error, OSError) and error.errno in UNREADABLE_ERRNOS and error.filename is not None:
        return f"{error.filename}: cannot be read ({error.strerror})"
    return None


def suggest(wrong: str, known: list[str]) -> str:
    """``did you mean 'x'?`` when one of ``known`` is close to ``wrong``, else the choices."""
    from difflib import get_close_matches

    swapped = [name for name in known if sorted(name) == sorted(wrong.lower())]
    if close := synonyms(wrong, known) or swapped or get_close_matches(wrong, known, n=1):
        return f"did you mean '{close[0]}'?"
    few = known if len(known) <= MAX_LISTED else [*known[:MAX_LISTED], f"and {len(known) - MAX_LISTED} more"]
    return "there are: " + (", ".join(few) or "none")


def synonyms(wrong: str, known: Iterable[str]) -> list[str]:
    """The ``known`` keys, by the last part of a dotted key, that other libraries call ``wrong``."""
    plain = wrong.lower().replace("-", "_")
    return [name for name in known if plain in (last := name.rpartition(".")[2], *SYNONYMS.get(last, ()))]


def as_sweep(key: str, text: str) -> str:
    """``; to sweep it: seed=0,1,2`` where ``text`` is a range of numbers (0-2) or a list ([0,1,2]), else empty."""
    if key.rpartition(".")[2].isdecimal():  # a place in a list, which is no key of a sweep
        return ""
    if bounds := FROM_TO.fullmatch(text.strip()):
        first, last = bounds.groups()
        whole = first.isdecimal() and last.isdecimal()
        if not float(first) < float(last):
            return ""
        if not whole:
            return f"; to sweep it: {key}={first},{last}"
        if int(last) - int(first) < MAX_WRITTEN_OUT:
            return f"; to sweep it: {key}={','.join(map(str, range(int(first), int(last) + 1)))}"
        each = f"'{key}=range({first},{int(last) + 1})'"
        return f"; to sweep it: {key}={first},{last}, or each number between them: {each}"
    thousands = re.fullmatch(r"\d{1,3}(?: \d{3})+", text.strip())  # 2 000 is one number
    if SEVERAL_NUMBERS.fullmatch(text.strip()) and not thousands:
        return f"; to sweep it: {key}={','.join(re.findall(NUMBER, text))}"
    return ""


def right_form(key: str, value: Any, kind: str) -> str:
    """A hint for a value that is not of its ``kind``: a range as a sweep, a single item as a list; else empty."""
    if re.search("int|float", kind) and (sweep := as_sweep(key, str(value))):
        return sweep
    is_item = isinstance(value, str | int | float) and not key.rpartition(".")[2].isdecimal()
    return f"; did you mean '{key}=[{value}]'?" if kind.startswith("list[") and is_item else ""


def printable(text: object) -> str:
    """A text, of a file perhaps, as one line that changes nothing of a terminal: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@functools.cache
def say_once(text: str) -> None:
    """Print a line on stderr, once in a process, as several points of a sweep may give cause for it."""
    print(f"peftsweep: {printable(text)}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or else its type."""
    return (message(error).splitlines() or [type(error).__name__])[0]


def message(error: BaseException) -> str:
    """The message of an exception; empty if its class, which may be of any library, fails to give one."""
    try:
        return str(error)
    except Exception:
        return ""


class Unwritable(Exception):
    """A study cannot be written, as on a full disk: no trial can be recorded; exit code 2."""


class SweepFailed(Exception):
    """At least one trial of a sweep failed or ran out of memory; exit code 1."""


class NotRun(SweepFailed):
    """A trial of the command was not run, or not to its end, without a failure; exit code 3."""


def some(names: Sequence[str]) -> str:
    """The first ``MAX_NAMED`` of ``names``, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
