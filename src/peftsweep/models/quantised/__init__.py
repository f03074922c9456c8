"""The libraries that store a base in fewer bits: what each needs, and what its layers are made of."""

__all__ = ["layers", "libraries"]
