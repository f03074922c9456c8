"""Which records of earlier versions hold wrong numbers, because of faults that are corrected since?"""

__all__ = ["faults"]
