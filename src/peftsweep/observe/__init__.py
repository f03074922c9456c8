"""How are time, memory and FLOPs measured, and progress shown?"""

__all__ = ["display", "fast_dtype", "flops", "measure", "profiler", "remaining", "streams", "tracker"]
