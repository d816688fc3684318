"""The machine: device selection, memory limits, the CPU backend, counters of memory, and child processes."""
