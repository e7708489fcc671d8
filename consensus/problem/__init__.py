"""What is trained: models, data, and the risk as a function of flat vectors.

Knows nothing of servers, workers, processes or configs.
"""

from consensus.problem.batched import BatchedRisk
from consensus.problem.data import DATASETS, Dataset
from consensus.problem.minibatches import PARTITIONS, Minibatches, partition
from consensus.problem.mnist import DataUnavailableError
from consensus.problem.models import MODELS, build_model
from consensus.problem.population_risk import WAYS, PopulationRisk, Way
from consensus.problem.risk import Batch, MinibatchRisk, Risk
from consensus.problem.streams import stream, stream_seed

__all__ = [
    "DATASETS",
    "MODELS",
    "PARTITIONS",
    "WAYS",
    "Batch",
    "BatchedRisk",
    "DataUnavailableError",
    "Dataset",
    "MinibatchRisk",
    "Minibatches",
    "PopulationRisk",
    "Risk",
    "Way",
    "build_model",
    "partition",
    "stream",
    "stream_seed",
]
