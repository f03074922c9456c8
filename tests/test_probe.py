"""What an architecture does with padding, later tokens and its cache is found out, not assumed."""
