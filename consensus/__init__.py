"""Consensus training: M workers, one model, and a Legendre potential that couples them."""

from importlib.metadata import PackageNotFoundError, version

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS, Potential
from consensus.core.profiles import Profile
from consensus.core.sizes import Radial, Separable
from consensus.coupling import Coupling

try:
    __version__ = version("consensus-training")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "POTENTIALS",
    "Coupling",
    "Layerwise",
    "Potential",
    "Profile",
    "Radial",
    "Separable",
    "__version__",
]
