"""The order of things; no torch."""
