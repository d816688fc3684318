"""The data pipeline: sources, documents, tokens, packed rows, batches on the device."""
