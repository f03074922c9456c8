"""Which trials of a sweep run, in which process and on which device?"""

__all__ = ["engine", "everything", "halving", "points", "processes", "slurm", "sweep", "workers"]
