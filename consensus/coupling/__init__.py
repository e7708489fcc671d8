"""Coupling: consensus training of any model with any optimizer, in the user's own loop."""

from consensus.coupling.coupling import Coupling
from consensus.coupling.elastic import ElasticCoupling

__all__ = ["Coupling", "ElasticCoupling"]
