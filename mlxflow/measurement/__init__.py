"""Memory, time and quality, measured."""
