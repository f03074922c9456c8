"""Where does a number of time or memory come from? The clock, the profiler, trackers, the display."""
