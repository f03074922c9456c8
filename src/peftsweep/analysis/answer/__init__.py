"""The answer of a study: one structure, from which terminal, RESULTS.md, report.html and answer.json are rendered."""
