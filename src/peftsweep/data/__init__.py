"""What is trained on? Files, templates, conversations, tokens, batches."""

__all__ = [
    "batches",
    "chat",
    "files",
    "fingerprint",
    "hub",
    "layouts",
    "prepare",
    "rows",
    "tasks",
    "templates",
    "tokens",
]
