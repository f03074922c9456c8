"""How do files and hub datasets become rows, prompts, tokens and batches?"""

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
