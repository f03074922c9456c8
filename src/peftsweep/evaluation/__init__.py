"""Where does a score come from? Metrics, likelihoods, generation, the inference benchmark."""

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
