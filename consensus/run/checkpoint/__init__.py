"""Checkpoints: manifest, reading, writing, resuming, and the run directory."""
