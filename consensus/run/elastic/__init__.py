"""Training with members that join and leave: the trainer, its process, its log and its replay."""
