"""The digits of scikit-learn: all of them, scaled, and the split of train_test_split."""

import numpy as np
import torch

from consensus.problem import DATASETS
from consensus.problem.digits import _shares, _split


def test_digits():
    from sklearn.datasets import load_digits  # 2 s, here and below: not where tests are collected

    data = DATASETS["digits"]
    assert data.train.inputs.shape == (1437, 1, 28, 28)
    assert data.test.inputs.shape == (360, 1, 28, 28)
    assert data.num_classes == 10
    assert data.train.inputs.dtype == torch.float32
    assert float(data.train.inputs.min()) == 0
    assert float(data.train.inputs.max()) <= 1
    # stratified: every class has its fifth in the test set, up to rounding
    in_total = np.bincount(load_digits().target)
    in_test = np.bincount(data.test.targets.numpy())
    assert np.abs(in_test - in_total * 360 / 1797).max() < 1


def test_digits_are_all_there_once_scaled_bilinearly():
    from sklearn.datasets import load_digits

    data = DATASETS["digits"]
    images = torch.cat([data.train.inputs, data.test.inputs])[:, 0].double().numpy()
    labels = torch.cat([data.train.targets, data.test.targets]).tolist()

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


def test_the_split_is_that_of_scikit_learn():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    found = _split(labels)
    expected = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    for own, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, theirs)


def test_shares_are_rounded_where_the_rest_is_largest():
    shares = _shares(np.array([10, 20, 30, 41]), 11, np.random.RandomState(0))
    assert shares.tolist() == [1, 2, 3, 5]  # of 1.09, 2.18, 3.27 and 4.47
