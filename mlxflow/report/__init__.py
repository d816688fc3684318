"""The structs of each stage's report, and the HTML report of a run: one self-contained page without requests."""
