"""Where is the step? The loop, packs of adapters, checkpoints, compilation."""

__all__ = [
    "capture",
    "checkpoint",
    "compiled",
    "fused",
    "graphs",
    "length",
    "loop",
    "optimizer",
    "packed",
    "run",
    "slots",
]
