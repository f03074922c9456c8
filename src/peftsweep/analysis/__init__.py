"""Which configuration is best, and how sure is that? Nothing in here imports torch."""

__all__ = ["collect", "forecast_report", "prune"]
