"""Consensus training: M workers, one model, and a Legendre potential that ties them together."""

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS, Potential, Radial, Separable
from consensus.core.profiles import Profile

__all__ = ["POTENTIALS", "Layerwise", "Potential", "Profile", "Radial", "Separable"]
