"""Records as tables."""

__all__ = ["columns", "naming", "table", "where"]
