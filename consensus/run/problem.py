"""The training problem of a run from its config: data, model, loss and shards, or one refusal."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consensus.comm import Group
from consensus.problem import (
    DATASETS,
    MODELS,
    Dataset,
    DataUnavailableError,
    Loss,
    Minibatches,
    SampleError,
    Samples,
    Trial,
    build_model,
    partition,
    try_evaluation,
    try_model,
)
from consensus.run.checks import ConfigError, require
from consensus.run.config import Config
from consensus.run.limits import MachineError, exceeded
from consensus.run.plugins import place_in_user_code

TRIED = 2  # samples in the trial of a model, at most


def load_data(config: Config) -> Dataset:
    """The data set of the config, on the CPU, with its validation samples."""
    options = DATASETS.completed(config.data.name, config.data.options, root=config.data.root)
    try:
        dataset = DATASETS.make(config.data.name, **options)
        for samples in dataset.splits.values():
            samples[:1]  # a dataset in storage that cannot be read is refused here
        dataset = dataset.loaded_by(config.data.loader_workers)
        return dataset.hold_out(config.data.validation) if config.data.validation else dataset
    except DataUnavailableError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, TypeError, OSError, SampleError) as error:
        raise ConfigError(f"`data` is {config.data.name} {options}: {error}") from error


def make_model(config: Config, dataset: Dataset, loss: Loss) -> tuple[nn.Module, Trial]:
    """The model of the config, on the device and in the dtype of the data, after a trial.

    The samples, the model and the loss fit each other, or a ConfigError says which does not.
    """
    samples = dataset.train[: min(TRIED, config.algorithm.batch_size)]
    options = model_options(config, dataset)
    try:
        model = build_model(config.model.name, config.seed, config.dtype_of_u, **options)
        model = model.to(next(samples.tensors()).device)
        trial = try_model(model, loss, samples, dataset.num_classes)
    except Exception as error:  # a user's model may do anything
        if limit := exceeded(error):
            raise MachineError(limit) from error
        raise ConfigError(f"`model` is {config.model.name} {options}: {_told(error)}") from error
    others = {name: split for name, split in dataset.splits.items() if name != "train"}
    for name, split in others.items():
        try:
            try_evaluation(model, loss, split[:TRIED], dataset.num_classes)
        except Exception as error:  # its samples may be of another kind than those of training
            own = f"`data` is {config.data.name} {config.data.options}"
            fails = f"the model, which takes the training set, fails on the {name} set"
            raise ConfigError(f"{own}: {fails}: {_told(error)}") from error
    _check_targets(config, dataset, loss)
    return model, trial


def difference_of_data(dataset: Dataset, group: Group) -> str | None:
    """A line if the processes have read different samples. A collective."""
    first, *others = group.gather_objects(dataset.fingerprint())
    for rank, own in enumerate(others, start=1):
        if names := [name for name in first if own.get(name) != first[name]]:
            sets = ", ".join(f"`{name}`" for name in names)
            return (
                f"rank {rank} has other samples of {sets} than rank 0, if this is not meant: "
                "another data.root or version of the data; evaluations take a share of each"
            )
    return None


def _told(error: Exception) -> str:
    """An error of a model, a loss or a metric, and its place in the code of the user."""
    plain = isinstance(error, ValueError | TypeError | RuntimeError | OverflowError) and str(error)
    text = str(error) if plain else f"{type(error).__name__}: {error}"
    place = place_in_user_code(error)
    return f"{text} ({place})" if place else text


def _check_targets(config: Config, dataset: Dataset, loss: Loss) -> None:
    """Refuse targets for which the loss is not defined: all in memory, some of those in storage."""
    for name, split in dataset.splits.items():
        read = split if isinstance(split, Samples) else split[:TRIED]
        if wrong := loss.outside(read.targets):
            raise ConfigError(f"`loss` is {config.loss.name}, and the targets of `{name}` {wrong}")


def model_options(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The options of the model: those of the config, after those that follow from the data."""
    return MODELS.completed(config.model.name, config.model.options, **offered(dataset))


def offered(dataset: Dataset) -> dict[str, Any]:
    """The options of a model that follow from the data."""
    return {} if dataset.num_classes is None else {"num_classes": dataset.num_classes}


def make_shards(config: Config, dataset: Dataset, num_workers: int) -> list[Tensor]:
    """The training indices of each of the M workers, at least a minibatch each.

    Every rank checks every shard, so all ranks refuse alike.
    """
    data, batch_size = config.data, config.algorithm.batch_size
    classes = dataset.labels is not None or data.partition not in ("label_skew", "by_label")
    found = f"{data.partition} without classes"
    allowed = "full, sharded for targets that are no classes (N,)"
    if not dataset.in_memory:
        allowed = "full, sharded, or a data set with an attribute `targets`, its classes (N,)"
    require(classes, "data.partition", found, allowed)
    labels = torch.zeros(len(dataset.train)) if dataset.labels is None else dataset.labels.cpu()
    try:
        shards = partition(labels, data.partition, num_workers, config.seed, data.alpha)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    smallest = min(range(num_workers), key=lambda j: len(shards[j]))
    most = len(shards[smallest])
    if most < batch_size and data.partition == "label_skew":
        allowed = (
            f"a value for which each of the {num_workers} workers has at least algorithm.batch_size"
            f" = {batch_size} samples; with seed = {config.seed} worker {smallest} has {most}"
            f"{_larger_alpha(config, labels, num_workers)}"
        )
        raise ConfigError(f"`data.alpha` is {data.alpha:g}; allowed: {allowed}")
    allowed = (
        f"at most {most}, the samples in the shard of worker {smallest} "
        f"(data.partition={data.partition}, {num_workers} workers)"
    )
    require(batch_size <= most, "algorithm.batch_size", batch_size, allowed)
    return shards


def make_minibatches(
    config: Config,
    shards: Sequence[Tensor],
    numbers: Sequence[int],
    own: range,
    device: torch.device,
) -> list[Minibatches]:
    """The sources of the workers at the places `own`; every rank checks those of all M workers.

    `numbers` are the numbers j of the M workers, by place.
    """
    algorithm = config.algorithm
    given, strides = algorithm.step_every, algorithm.strides(len(shards))
    allowed = f"null, or a list of {len(shards)} whole numbers >= 1, one for each worker"
    require(len(strides) == len(shards), "algorithm.step_every", given, allowed)
    return [
        Minibatches(
            shards[i].to(device), algorithm.batch_size, config.seed, numbers[i], every=strides[i]
        )
        for i in own
    ]


def _larger_alpha(config: Config, labels: Tensor, num_workers: int) -> str:
    """A remedy for shards that are too small: a larger alpha, found by trying, or fewer workers."""
    data, batch_size = config.data, config.algorithm.batch_size
    alpha = data.alpha
    while batch_size * num_workers <= len(labels) and (alpha := 2 * alpha) <= 1e9:
        shards = partition(labels, data.partition, num_workers, config.seed, alpha)
        if min(map(len, shards)) >= batch_size:
            return f"; data.alpha={alpha:g} works, or take fewer workers or another seed"
    return "; take fewer workers or a smaller batch"
