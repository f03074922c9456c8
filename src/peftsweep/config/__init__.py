"""What does a command line mean? From composed words to a checked trial with an identity."""
