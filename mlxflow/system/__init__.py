"""The operating system: the terminal, child processes that end with their parent, and reasons of failed calls."""
