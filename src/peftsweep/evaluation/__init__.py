"""How is it scored: generation, likelihood, metrics, speed of inference?"""

__all__ = [
    "decoding",
    "evaluate",
    "harness",
    "inference",
    "inference_plan",
    "isolation",
    "likelihood",
    "metrics",
    "scaled",
    "static_decoding",
]
