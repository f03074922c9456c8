"""What was found, in sentences: RESULTS.md."""

__all__ = ["findings", "halving_notes", "paired", "recommendations", "report", "retention", "searches", "words"]
