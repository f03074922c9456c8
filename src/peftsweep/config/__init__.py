"""What does a command line mean? From composed words to a checked trial with an identity."""

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
