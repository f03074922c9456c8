"""Commands on a few rows or one trial: show the tokens of a row, and write text with a trained model."""

__all__ = ["chat_with", "show_rows"]
