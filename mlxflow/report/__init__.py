"""The HTML report: load the reports of a run, draw plots, and write one self-contained page without requests."""
