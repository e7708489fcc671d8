"""Data sets by name."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from consensus.problem import (
    DATASETS,
    Dataset,
)


def test_digits():
    data = DATASETS["digits"]
    assert data.train_images.shape == (1437, 1, 28, 28)
    assert data.test_images.shape == (360, 1, 28, 28)
    assert data.num_classes == 10
    assert data.train_images.dtype == torch.float32
    assert float(data.train_images.min()) == 0
    assert float(data.train_images.max()) <= 1
    # stratified: every class has its fifth in the test set, up to rounding
    in_total = np.bincount(load_digits().target)
    in_test = np.bincount(data.test_labels.numpy())
    assert np.abs(in_test - in_total * 360 / 1797).max() < 1


def test_digits_are_all_there_once_scaled_bilinearly():
    data = DATASETS["digits"]
    images = torch.cat([data.train_images, data.test_images])[:, 0].double().numpy()
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()

    # pixel i of 28 has its centre at (i + 1/2) 8/28 - 1/2 of the 8, clamped at the border
    scale = np.zeros((28, 8))
    for i in range(28):
        place = min(max((i + 0.5) * 8 / 28 - 0.5, 0.0), 7.0)
        low = min(int(place), 6)
        scale[i, low], scale[i, low + 1] = 1 - (place - low), place - low
    original = load_digits()
    scaled = scale @ (original.images / 16) @ scale.T

    # the order is that of the split: find for each image the one that it was made from
    flat = scaled.reshape(1797, -1)
    squares = (flat**2).sum(axis=1)
    nearest = [int(np.argmin(squares - 2 * flat @ image.ravel())) for image in images]
    assert sorted(nearest) == list(range(1797))
    assert np.abs(scaled[nearest] - images).max() < 1e-6
    assert original.target[nearest].tolist() == labels


def test_to_changes_the_type_of_images_only():
    data = DATASETS["digits"]
    double = data.to("cpu", torch.float64)
    assert double.train_images.dtype == double.test_images.dtype == torch.float64
    assert double.train_labels.dtype == double.test_labels.dtype == torch.int64
    assert torch.equal(double.train_images, data.train_images.double())
    assert torch.equal(double.test_labels, data.test_labels)
    assert double.num_classes == 10


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), "shapes"),
        (torch.tensor([[0], [1], [2]]), "shapes"),
        (torch.tensor([0.0, 1.0, 2.0]), "int64"),
        (torch.tensor([0, 1, 3]), "go from 0 to 3; allowed: 0 to 2"),
        (torch.tensor([-1, 1, 2]), "go from -1 to 2"),
    ],
)
def test_data_set_refuses_labels_that_do_not_fit(labels, message):
    images, good = torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=f"`train_labels`.*{message}"):
        Dataset(images, labels, images, good, num_classes=3)
    with pytest.raises(ValueError, match=f"`test_labels`.*{message}"):
        Dataset(images, good, images, labels, num_classes=3)
