"""Consensus training: M workers, one model, and a Legendre potential that ties them together."""

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS

__all__ = ["POTENTIALS", "Layerwise"]
