"""Data sets: samples of any shape and type, their classes, and those held out of training."""

import math
import re

import numpy as np
import pytest
import torch

from consensus.problem import DATASETS, Dataset, Samples


def test_to_changes_the_type_of_images_only():
    data = DATASETS["digits"]
    double = data.to("cpu", torch.float64)
    assert double.train.inputs.dtype == double.test.inputs.dtype == torch.float64
    assert double.train.targets.dtype == double.test.targets.dtype == torch.int64
    assert torch.equal(double.train.inputs, data.train.inputs.double())
    assert torch.equal(double.test.targets, data.test.targets)
    assert double.num_classes == 10


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), "targets int64 (2,); allowed: as many targets as inputs"),
        (torch.tensor([0, 1, 3]), "the classes of `{0}` go from 0 to 3; allowed: 0 to 2"),
        (torch.tensor([[0], [-1], [2]]), "the classes of `{0}` go from -1 to 2"),
        ([0, 1, 2], "a int among the samples; allowed: tensors or arrays (N, ...)"),
        (torch.tensor(1), "a number among the samples"),
    ],
)
def test_data_set_refuses_targets_that_do_not_fit(labels, message):
    images, good = torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2])
    for name in ("train", "test"):
        given = {"train": (images, good), "test": (images, good), name: (images, labels)}
        with pytest.raises(ValueError, match=re.escape(message.format(name))) as refusal:
            Dataset(**given, num_classes=3)
        assert f"`{name}`" in str(refusal.value)


@pytest.mark.parametrize("given", [None, torch.zeros(3), (torch.zeros(3),), "train.npy"])
def test_what_is_no_pair_is_refused(given):
    with pytest.raises(ValueError, match=r"`train` of the data set has .*; allowed: Samples, or"):
        Dataset(given, (torch.zeros(3), torch.zeros(3)))


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="`test` of the data set has no samples"):
        Dataset((torch.zeros(3), torch.zeros(3)), (torch.zeros(0), torch.zeros(0)))


def test_samples_are_trees_of_arrays():
    """A dict of a float image and integer tokens, from NumPy; the targets are a pair."""
    rng = np.random.default_rng(0)
    image, tokens = rng.random((6, 2, 2)), rng.integers(0, 9, (6, 4), dtype=np.int32)
    mask, weight = rng.random((6, 4)) < 0.5, rng.random(6, dtype=np.float32)
    samples = Samples({"image": image, "tokens": tokens}, [mask, weight])
    assert len(samples) == 6
    moved = samples.to("cpu", torch.float32)
    assert moved.inputs["image"].dtype == moved.targets[1].dtype == torch.float32
    assert moved.inputs["tokens"].dtype == torch.int64
    assert moved.targets[0].dtype == torch.bool
    chosen = moved.select(torch.tensor([4, 1]))
    assert torch.equal(chosen.inputs["tokens"], torch.tensor(tokens[[4, 1]]).long())
    assert chosen.targets[0].tolist() == mask[[4, 1]].tolist()
    parts = list(moved.split(4))
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(parts[1].targets[1], torch.tensor(weight[4:]))
    shares = [moved.share(rank, 4).inputs["image"] for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 1, 1]
    assert torch.equal(torch.cat(shares), torch.tensor(image, dtype=torch.float32))
    assert len(moved.share(7, 8)) == 0


def test_pixels_of_uint8_become_numbers_in_0_to_1_and_this_is_said():
    pixels = torch.tensor([[0, 51], [255, 102]], dtype=torch.uint8)
    data = Dataset((pixels, torch.tensor([0, 1])), (pixels, torch.tensor([0, 1])))
    moved = data.to("cpu", torch.float64)
    expected = torch.tensor([[0.0, 0.2], [1.0, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(moved.train.inputs, expected)
    assert [remark.partition(";")[0] for remark in moved.remarks] == [
        "inputs of uint8 are scaled to [0, 1]"
    ]
    floats = Dataset((pixels.float(), pixels.float()), (pixels.float(), pixels.float()))
    assert floats.to("cpu", torch.float32).remarks == ()


def test_samples_that_are_not_finite_are_counted_and_this_is_said():
    x, y = torch.zeros(5, 2, 3), torch.zeros(5)
    wrong = x.clone()
    wrong[1, 0, 2], wrong[1, 1, 0], wrong[4, 1, 1] = math.nan, math.inf, -math.inf
    targets = torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0])
    data = Dataset((x, y), (wrong, targets), validation=(x, targets))
    assert data.to("cpu", torch.float32).remarks == (
        "1 of 5 samples of `validation` are not finite",
        "3 of 5 samples of `test` are not finite",
    )
    assert Dataset((x.int(), y.int()), (x.int(), y.int())).to("cpu", torch.float32).remarks == ()


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, torch.complex64), (torch.float64, torch.complex128)]
)
def test_complex_samples_stay_complex(dtype, expected):
    """Of integers there would be the real parts alone."""
    x = torch.tensor([[1.5 + 2.5j], [0.5j]])
    moved = Dataset((x, x), (x, x)).to("cpu", dtype)
    assert moved.train.inputs.dtype == moved.test.targets.dtype == expected
    assert torch.equal(moved.train.inputs, x.to(expected))


def test_a_list_of_samples_is_refused_in_few_words():
    given = [(torch.zeros(4), 0)] * 60000
    with pytest.raises(
        ValueError, match=r"\.\.\. 60000 parts\); allowed: Samples, or a pair"
    ) as line:
        Dataset(given, given)
    assert len(str(line.value)) < 400


def test_samples_have_no_graph():
    """Samples that were computed from parameters would be differentiated with the loss."""
    x = torch.ones(4, 2, requires_grad=True)
    data = Dataset((2 * x, x.sum(1)), (x, x.sum(1)))
    assert not any(t.requires_grad for split in data.splits.values() for t in split.tensors())
    assert data.fingerprint() == data.to("cpu", torch.float32).fingerprint()


def test_classes_are_counted_where_targets_are_classes():
    x, labels = torch.zeros(4, 2), torch.tensor([0, 5, 1, 1])
    assert Dataset((x, labels), (x, labels + 1)).num_classes == 7
    assert Dataset((x, labels.to(torch.uint8)), (x, labels)).labels.tolist() == labels.tolist()
    assert Dataset((x, labels.float()), (x, labels.float())).num_classes is None
    tokens = labels.view(2, 2)
    assert Dataset((x[:2], tokens), (x[:2], tokens)).num_classes is None
    ignored = torch.tensor([[0, -100], [1, -100]])
    assert Dataset((x[:2], ignored), (x[:2], ignored), num_classes=2).num_classes == 2


def test_a_share_of_the_training_samples_is_held_out():
    x = torch.arange(10.0).unsqueeze(1)
    data = Dataset((x, torch.arange(10) % 2), (x[:2], torch.tensor([0, 1])))
    split = data.hold_out(0.3)
    assert (len(split.train), len(split.validation), len(split.test)) == (7, 3, 2)
    both = torch.cat([split.train.inputs, split.validation.inputs]).flatten().tolist()
    assert sorted(both) == list(range(10))
    assert split.train.targets.tolist() == [int(i) % 2 for i in split.train.inputs.flatten()]
    assert torch.equal(data.hold_out(0.3).validation.inputs, split.validation.inputs)
    assert list(split.splits) == ["train", "validation", "test"]
    for share in (0.01, 0.99):
        with pytest.raises(ValueError, match=f"`data.validation` is {share}; allowed: a share of"):
            data.hold_out(share)
