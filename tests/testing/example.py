"""A rank of an example: runs its `main`, and saves the losses and u that it returns."""

import importlib
import os
import sys

import torch


def main() -> None:
    name, *arguments = sys.argv[1:]
    losses, state = importlib.import_module(f"examples.{name}").main(arguments)
    torch.save((losses, state), f"answer{os.environ['RANK']}.pt")
