"""The benchmark suite: recipes timed in turns, throughput, convergence, ceilings and the comparison of reports."""
