"""A training run: configuration, files, clocks and screens around Algorithm 1."""
