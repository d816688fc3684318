"""The quality of models: perplexity, divergence from a dense model, and generated text."""
