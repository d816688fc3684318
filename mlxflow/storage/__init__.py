"""Files: artifacts written whole, content digests, locks, paths, and which files make a model folder."""
