"""What happens in one trial, from its claim to its record?"""

__all__ = ["done", "foreseen", "outcome", "session", "task"]
