"""What is the answer? Tables, statistics, text and figures of a study. Nothing in here imports torch."""

__all__ = ["collect", "forecast_report", "prune"]
