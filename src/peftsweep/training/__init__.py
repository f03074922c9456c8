"""Where is the step? The loop, packs of adapters, checkpoints, compilation."""
