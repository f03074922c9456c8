"""What is adapted, and how? Bases, methods attached to them, what is saved of them."""

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
