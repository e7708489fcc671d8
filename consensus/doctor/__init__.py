"""What a job needs of its machines, checked before it is started: python -m consensus.doctor."""
