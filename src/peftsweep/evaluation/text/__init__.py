"""Texts that a model writes, compared with references and described by themselves."""

__all__ = ["numerals", "overlap"]
