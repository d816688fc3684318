"""Files: atomic artifacts, safetensors, reports, content digests, locks, paths, and the files of a model folder."""
