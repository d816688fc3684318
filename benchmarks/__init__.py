"""Figures: each file prints some, beside its peers, on the machine that it runs on."""
