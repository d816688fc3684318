"""The trainer: loss, compiled step, schedule and loop."""
