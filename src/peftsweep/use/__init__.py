"""Commands on a few rows or one trial: what the model sees of a row, and what it writes."""

__all__ = ["chat_with", "show_rows"]
