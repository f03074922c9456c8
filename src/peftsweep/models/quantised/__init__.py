"""The libraries that quantise a base: their requirements, and their layers."""

__all__ = ["layers", "libraries"]
