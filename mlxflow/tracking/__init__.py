"""Reports of finished and running stages to experiment trackers, by processes of their own."""
