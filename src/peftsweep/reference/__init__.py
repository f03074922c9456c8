"""What a key or a column means."""
