"""Files: atomic artifacts, safetensors, TOML tables, content digests, locks, paths, and the files of a model folder."""
