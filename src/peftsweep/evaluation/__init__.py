"""Where does a score come from? Metrics, likelihoods, generation, the inference benchmark."""
