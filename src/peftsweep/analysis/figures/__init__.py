"""What was found, in pictures: plots and report.html."""

__all__ = ["page", "plot"]
