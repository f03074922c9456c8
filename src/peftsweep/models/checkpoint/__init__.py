"""The files of a checkpoint: what they hold, by their headers, and what they lack."""

__all__ = ["weights"]
