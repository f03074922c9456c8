"""What is adapted, and how? Load a base, attach a method to it, save and restore the result."""

__all__ = [
    "attach",
    "compatibility",
    "coverage",
    "initialise",
    "losses",
    "model",
    "parts",
    "probe",
    "saved",
    "shapes",
    "shortcuts",
]
