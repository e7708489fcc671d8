"""Sweeps: grids of configurations, their jobs, the dashboard, and population training."""
