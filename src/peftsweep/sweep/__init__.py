"""Who runs which trials, when and where? Workers, packs, launchers, halving."""

__all__ = ["engine", "everything", "halving", "points", "processes", "slurm", "sweep", "workers"]
