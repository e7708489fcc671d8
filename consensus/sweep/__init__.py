"""Many runs: a grid of configurations, its jobs, and their progress."""
