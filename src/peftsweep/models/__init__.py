"""How is the base loaded and quantised, and the adapter attached, saved and merged?"""

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
