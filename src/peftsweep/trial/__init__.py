"""What happens in one trial? Its stages in order, what it finds done, what its record says of it."""

__all__ = ["done", "foreseen", "outcome", "session", "task"]
