"""The embedded model: its weights, its task, and the script that made it."""
