"""Which checked trial, with which identity, does a command line describe?"""

__all__ = [
    "build",
    "calls",
    "checks",
    "compose",
    "evaluations",
    "experiment",
    "experiment_keys",
    "fill",
    "identity",
    "repeat",
]
