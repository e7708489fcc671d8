"""Helpers of the tests: rank processes, fault injection, hosts, a SLURM cluster, an image."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
