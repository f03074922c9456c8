"""Imports all modules of a sweep, in the process of the command and in the process that workers are forked from.

While modules are made, Python's garbage collector looks through all that is there again and again, for a fourth of the
time, and finds nothing. Nor does it later, so they are left out of what it looks at from then on.
"""

import gc

gc.disable()
try:
    from peftsweep.sweep import sweep, workers
finally:
    gc.enable()
gc.freeze()

__all__ = ["sweep", "workers"]
