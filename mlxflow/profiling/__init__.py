"""Memory of processes, systems and training steps: readings, phases, leaks, peaks and suggestions."""
