"""The training problem: data, models, losses, minibatches, and the risk of flat vectors.

It does not depend on servers, workers, processes or configs.
"""

from consensus.problem import digits  # noqa: F401  (registers a data set)
from consensus.problem.data import DATASETS, Dataset
from consensus.problem.losses import LOSSES, Loss, Metric
from consensus.problem.minibatches import PARTITIONS, Minibatches, partition
from consensus.problem.mnist import DataUnavailableError
from consensus.problem.models import MODELS, build_model
from consensus.problem.population_risk import WAYS, BatchedRisk, PopulationRisk, Way
from consensus.problem.reader import SampleError
from consensus.problem.risk import NUMBERS_AT_ONCE, Batch, MinibatchRisk, Risk
from consensus.problem.samples import Samples
from consensus.problem.stored import StoredSamples
from consensus.problem.streams import stream, stream_seed
from consensus.problem.trial import Trial, try_evaluation, try_model

__all__ = [
    "DATASETS",
    "LOSSES",
    "MODELS",
    "NUMBERS_AT_ONCE",
    "PARTITIONS",
    "WAYS",
    "Batch",
    "BatchedRisk",
    "DataUnavailableError",
    "Dataset",
    "Loss",
    "Metric",
    "MinibatchRisk",
    "Minibatches",
    "PopulationRisk",
    "Risk",
    "SampleError",
    "Samples",
    "StoredSamples",
    "Trial",
    "Way",
    "build_model",
    "partition",
    "stream",
    "stream_seed",
    "try_evaluation",
    "try_model",
]
