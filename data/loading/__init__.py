"""From the order of samples to batches of pixels."""
