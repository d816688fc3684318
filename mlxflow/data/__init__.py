"""From sources to documents, to tokens, to batches on the device."""
