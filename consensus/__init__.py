"""Consensus training: M workers, one model, and a Legendre potential that ties them together."""

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS, Potential
from consensus.core.profiles import Profile
from consensus.core.sizes import Radial, Separable

__all__ = ["POTENTIALS", "Layerwise", "Potential", "Profile", "Radial", "Separable"]
