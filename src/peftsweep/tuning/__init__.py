"""Which trial is worth running next? sweep=tune and sweep=league, as functions of the results so far."""

__all__ = ["command"]
