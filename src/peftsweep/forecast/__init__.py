"""What is known before anything runs? Memory, refusals, size."""
