"""What is trained on? Files, templates, conversations, tokens, batches."""
