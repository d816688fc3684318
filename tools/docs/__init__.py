"""The reference pages of `docs/`, generated from the code."""
