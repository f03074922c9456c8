"""The embedded model: weights that ship with the package, the task they are adapted to, and the script that made both."""
