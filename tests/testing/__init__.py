"""Test helpers: rank processes, fault injection, virtual hosts, a SLURM cluster, an image."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout."""
