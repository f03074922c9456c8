"""Conversations as files hold them -> turns as chat templates take them."""

__all__ = ["places", "reader", "template", "trees", "turns"]
