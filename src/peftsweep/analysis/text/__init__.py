"""What was found, in sentences: RESULTS.md."""
