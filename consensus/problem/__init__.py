"""The training problem: models, data sets, minibatches, and the risk of flat vectors.

It does not depend on servers, workers, processes or configs.
"""

from consensus.problem.data import DATASETS, Dataset, DataUnavailableError
from consensus.problem.minibatches import PARTITIONS, Minibatches, partition
from consensus.problem.models import MODELS, build_model
from consensus.problem.population_risk import WAYS, BatchedRisk, PopulationRisk, Way
from consensus.problem.risk import Batch, MinibatchRisk, Risk
from consensus.problem.streams import stream, stream_seed
from consensus.problem.trial import require_logits

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
    "require_logits",
    "stream",
    "stream_seed",
]
