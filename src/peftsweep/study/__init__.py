"""Which files does a study have, and how are they read, written and locked?"""

__all__ = ["atomic", "claims", "owner", "reading", "record", "rungs", "scores", "store", "sweep_record", "trust"]
