"""What does a key or a column mean?"""

__all__ = ["keys", "meanings"]
