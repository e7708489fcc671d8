"""Preflight check of machines, network and configuration: python -m consensus.doctor."""
