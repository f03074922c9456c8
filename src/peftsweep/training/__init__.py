"""How is it trained: step, optimizer, schedule, checkpoints, CUDA graphs, packs?"""

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
