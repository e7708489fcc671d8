"""The test error of a finished run on digits, by torch and scikit-learn alone.

    python examples/load_model.py runs/RUN

`model.pt` of a run is a plain state_dict, so that any program of torch can read it.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


def lenet5():
    pooled = {"relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2)}
    again = {"relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2), "flat": nn.Flatten()}
    layers = {"conv1": nn.Conv2d(1, 20, 5), **pooled, "conv2": nn.Conv2d(20, 50, 5), **again}
    return nn.Sequential(OrderedDict(**layers, fc=nn.Linear(800, 10)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args(arguments).run
    digits = load_digits()
    split = {"test_size": 0.2, "random_state": 0, "stratify": digits.target}
    _, x, _, y = train_test_split(digits.images / 16, digits.target, **split)
    x = torch.tensor(x[:, None]).float()
    x = nn.functional.interpolate(x, size=(28, 28), mode="bilinear")
    model = lenet5()
    model.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    error = 100 * (model(x).argmax(1).numpy() != y).mean()
    print(f"test error {error:.2f} %")
    return error


if __name__ == "__main__":
    main()
