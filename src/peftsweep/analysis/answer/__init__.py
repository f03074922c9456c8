"""The answer of a study: one structure, from which terminal, RESULTS.md, report.html and answer.json are rendered."""

__all__ = ["build", "decided", "render", "structure", "tables"]
