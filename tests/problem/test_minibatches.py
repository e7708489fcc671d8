"""Partitions among the workers, and the minibatches of one worker."""

import numpy as np
import pytest
import torch

from consensus.problem import (
    PARTITIONS,
    Minibatches,
    partition,
)


def skewed_labels(count=1003):
    generator = torch.Generator().manual_seed(11)
    return (torch.rand(count, generator=generator) ** 2 * 10).long()


def test_full_gives_everything_to_everyone():
    shards = partition(skewed_labels(), "full", 4, seed=0, alpha=1.0)
    assert [shard.tolist() for shard in shards] == [list(range(1003))] * 4


@pytest.mark.parametrize("workers", [1, 4, 10])
def test_sharded_is_disjoint_and_even(workers):
    shards = partition(skewed_labels(), "sharded", workers, seed=0, alpha=1.0)
    assert [len(shard) for shard in shards] == [1003 // workers] * workers
    used = torch.cat(shards).tolist()
    assert len(set(used)) == len(used)
    assert set(used) <= set(range(1003))


def test_sharded_is_random():
    first, _ = partition(torch.zeros(10_000, dtype=torch.int64), "sharded", 2, seed=0, alpha=1.0)
    # 5000 of 10000 without replacement: the number from the lower half is 2500 +- 25
    assert abs(int((first < 5000).sum()) - 2500) < 150


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 1.0, 1e9])
@pytest.mark.parametrize("workers", [1, 4, 7])
def test_label_skew_uses_every_sample_once(alpha, workers):
    shards = partition(skewed_labels(), "label_skew", workers, seed=0, alpha=alpha)
    assert len(shards) == workers
    assert sorted(torch.cat(shards).tolist()) == list(range(1003))


def test_label_skew_goes_from_even_to_one_worker_per_class():
    labels = skewed_labels()
    even = partition(labels, "label_skew", 4, seed=0, alpha=1e9)
    for shard in even:
        counts = torch.bincount(labels[shard], minlength=10)
        assert float((counts - torch.bincount(labels) / 4).abs().max()) <= 1
    extreme = partition(labels, "label_skew", 4, seed=0, alpha=1e-6)
    classes = [set(labels[shard].tolist()) for shard in extreme]
    assert sum(len(some) for some in classes) == 10
    assert set.union(*classes) == set(range(10))


def test_label_skew_has_dirichlet_proportions():
    """The share of one worker is Beta(alpha, (M - 1) alpha): its mean and variance are known."""
    labels = torch.zeros(1000, dtype=torch.int64)
    shares = [
        len(partition(labels, "label_skew", 4, seed=seed, alpha=0.5)[j]) / 1000
        for seed in range(500)
        for j in (0, 3)
    ]
    a, b = 0.5, 1.5
    assert np.mean(shares) == pytest.approx(a / (a + b), abs=0.04)
    assert np.var(shares) == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), abs=0.012)


@pytest.mark.parametrize("workers", [1, 4, 10])
def test_by_label_gives_each_worker_whole_classes(workers):
    labels = skewed_labels()
    shards = partition(labels, "by_label", workers, seed=0, alpha=1.0)
    for j, shard in enumerate(shards):
        assert set(labels[shard].tolist()) == set(range(j, 10, workers))
    assert sorted(torch.cat(shards).tolist()) == list(range(1003))


def test_by_label_divides_a_class_where_there_are_more_workers():
    labels = 5 * (torch.arange(100) % 3)  # 34, 33 and 33 samples of the classes 0, 5 and 10
    shards = partition(labels, "by_label", 8, seed=0, alpha=1.0)
    assert [set(labels[shard].tolist()) for shard in shards] == [{5 * (j % 3)} for j in range(8)]
    assert [len(shard) for shard in shards] == [12, 11, 17, 11, 11, 16, 11, 11]
    assert sorted(torch.cat(shards).tolist()) == list(range(100))


@pytest.mark.parametrize("kind", ["sharded", "label_skew", "by_label"])
def test_partition_depends_on_the_seed_only(kind):
    def make(seed):
        return [s.tolist() for s in partition(skewed_labels(), kind, 4, seed=seed, alpha=0.5)]

    first = make(0)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002, that the legacy global state has no influence
    assert make(0) == first
    assert make(1) != first


@pytest.mark.parametrize("kind", list(PARTITIONS))
def test_partition_gives_int64(kind):
    shards = partition(skewed_labels(), kind, 3, seed=0, alpha=0.5)
    assert {shard.dtype for shard in shards} == {torch.int64}


def test_partition_refuses():
    labels = skewed_labels(5)
    line = r"`data\.partition` is 'iid'; allowed: full, sharded, label_skew, by_label"
    with pytest.raises(ValueError, match=line):
        partition(labels, "iid", 2, seed=0, alpha=1.0)
    with pytest.raises(ValueError, match=r"`data\.partition` is 'sharded' with 6 .* 5 samples"):
        partition(labels, "sharded", 6, seed=0, alpha=1.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_label_skew_refuses_alpha(alpha):
    with pytest.raises(ValueError, match=rf"`data\.alpha` is {alpha}; allowed"):
        partition(skewed_labels(5), "label_skew", 2, seed=0, alpha=alpha)


def draws(source, count):
    return [source.draw().tolist() for _ in range(count)]


def test_an_epoch_is_a_permutation_without_its_rest():
    shard = torch.arange(100, 123)  # 23 samples, 4 batches of 5, 3 left over
    source = Minibatches(shard, 5, seed=0, worker=2)
    assert source.batches_per_epoch == 4
    epochs = [draws(source, 4) for _ in range(30)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [5] * 4
        used = [i for batch in epoch for i in batch]
        assert len(set(used)) == 20
        assert set(used) <= set(shard.tolist())
    assert len({str(epoch) for epoch in epochs}) == 30
    # The dropped samples differ, so that over the epochs all samples are used.
    assert {i for epoch in epochs for batch in epoch for i in batch} == set(shard.tolist())
    assert source.position == 120


def test_minibatches_depend_on_seed_and_worker_only():
    shard = torch.arange(50)
    first = draws(Minibatches(shard, 7, seed=0, worker=1), 20)
    other, same = Minibatches(shard, 7, seed=0, worker=3), Minibatches(shard, 7, seed=0, worker=1)
    interleaved = []
    for _ in range(20):
        other.draw()
        torch.rand(1)
        interleaved.append(same.draw().tolist())
    assert interleaved == first
    assert draws(Minibatches(shard, 7, seed=0, worker=2), 20) != first
    assert draws(Minibatches(shard, 7, seed=1, worker=1), 20) != first


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 13, 14, 30])
def test_position_is_the_whole_state(position):
    shard = torch.arange(50)  # 7 batches an epoch
    history = draws(Minibatches(shard, 7, seed=0, worker=1), 50)
    fresh = Minibatches(shard, 7, seed=0, worker=1)
    fresh.position = position
    assert draws(fresh, 20) == history[position : position + 20]
    used = Minibatches(shard, 7, seed=0, worker=1)
    draws(used, 10)
    used.position = position
    assert draws(used, 20) == history[position : position + 20]


def test_a_worker_with_too_few_samples():
    with pytest.raises(
        ValueError, match=r"`algorithm\.batch_size` is 20, and worker 3 has 19 samples"
    ):
        Minibatches(torch.arange(19), 20, seed=0, worker=3)
    with pytest.raises(ValueError, match=r"`algorithm\.batch_size` is 0"):
        Minibatches(torch.arange(19), 0, seed=0, worker=3)
    assert Minibatches(torch.arange(20), 20, seed=0, worker=3).draw().shape == (20,)


@pytest.mark.gpu
def test_minibatches_follow_the_device_of_their_indices():
    shard = torch.arange(50)
    on_device = Minibatches(shard.to("cuda"), 7, seed=0, worker=1)
    on_cpu = Minibatches(shard, 7, seed=0, worker=1)
    for _ in range(20):
        batch = on_device.draw()
        assert batch.device.type == "cuda"
        assert torch.equal(batch.cpu(), on_cpu.draw())
