"""What a command can end with besides success."""

import sys


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

    if close := get_close_matches(wrong, known, n=1):
        return f"did you mean '{close[0]}'?"
    return "there are: " + (", ".join(known) or "none")


class Unwritable(Exception):
    """A study cannot be written, as on a full disk: no trial can be recorded; exit code 2."""


class SweepFailed(Exception):
    """At least one trial of a sweep failed or ran out of memory; exit code 1."""
