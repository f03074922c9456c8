"""Where does a number of time or memory come from? The clock, the profiler, trackers, the display."""

__all__ = ["display", "fast_dtype", "flops", "measure", "profiler", "remaining", "streams", "tracker"]
