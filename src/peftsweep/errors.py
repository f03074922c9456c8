"""What a command can end with besides success."""

import sys

SYNONYMS = {  # what other libraries call our keys
    "learning_rate": ("lr",),
    "r": ("rank", "lora_r", "lora_rank"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "batch_size": ("bs", "batch", "train_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
    "accumulation": ("grad_accum", "gradient_accumulation", "gradient_accumulation_steps", "accumulation_steps"),
    "checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing", "use_gc"),
    "steps": ("max_steps", "num_steps", "train_steps"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "epoch"),
    "weight_decay": ("wd",),
    "clip": ("max_grad_norm", "grad_clip", "gradient_clipping", "grad_norm_clip"),
    "optimizer": ("optim",),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type"),
    "warmup": ("warmup_ratio", "warmup_steps"),
    "eval_every": ("eval_steps", "eval_interval", "validate_every"),
    "log_every": ("logging_steps", "log_interval"),
    "checkpoint_every": ("save_steps", "save_every"),
    "max_length": ("max_seq_length", "max_seq_len", "seq_len", "seq_length", "cutoff_len", "block_size"),
    "name_or_path": ("model_name_or_path", "model_id", "name", "path", "pretrained"),
    "dtype": ("torch_dtype", "precision"),
    "modules": ("target_modules",),
    "samples": ("limit", "num_samples", "max_samples", "n"),
    "seed": ("random_seed",),
}


LISTED = 80  # of the known names, in a message


class InputError(ValueError):
    """Wrong input, said in one line that names the key and what is allowed; exit code 2."""


def check_platform() -> None:
    """Say on which system this will not run, or has not been tested. To be called before anything heavy is imported.

    Raises:
        InputError: peftsweep does not run here.
    """
    if sys.platform == "win32":
        raise InputError("Windows is not supported: workers need Unix processes and signals; use WSL")
    if sys.platform != "linux":
        print(f"peftsweep: not tested on {sys.platform}, only on Linux; trials run on the CPU", file=sys.stderr)


def suggest(wrong: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` when one of ``known`` is close to ``wrong``, else the choices."""
    from difflib import get_close_matches

    synonyms = [name for name in known if wrong.lower() in SYNONYMS.get(name, ())]
    swapped = [name for name in known if sorted(name) == sorted(wrong.lower())]
    if close := synonyms or swapped or get_close_matches(wrong, known, n=1):
        return f"did you mean '{close[0]}'?"
    few = known if len(known) <= LISTED else [*known[:LISTED], f"and {len(known) - LISTED} more"]
    return "there are: " + (", ".join(few) or "none")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or else its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Unwritable(Exception):
    """A study cannot be written, as on a full disk: no trial can be recorded; exit code 2."""


class SweepFailed(Exception):
    """At least one trial of a sweep failed or ran out of memory; exit code 1."""


class NotRun(SweepFailed):
    """A trial that was asked for was not run, or not to its end, and did not fail either; exit code 3."""
