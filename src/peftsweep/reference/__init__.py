"""What a key or a column means."""

__all__ = ["keys", "meanings"]
