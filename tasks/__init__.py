"""The doit integration: turns a workflow into tasks and decides, by content, which of them are stale.

Everything is built on doit's own extension points. Nothing here imports mlx, numpy or safetensors, so that `doit` with
nothing to do starts as fast as doit itself.
"""
