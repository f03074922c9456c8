"""What do peftsweep-data show and peftsweep-chat print?"""

__all__ = ["chat_with", "show_rows"]
