"""What can be said of a table, and how surely."""
