"""What is adapted, and how? Bases, methods attached to them, what is saved of them."""
