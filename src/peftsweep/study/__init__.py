"""What lies on the disk? Records, the folder of a study and its files."""

__all__ = ["atomic", "claims", "owner", "reading", "record", "rungs", "scores", "store", "sweep_record", "trust"]
