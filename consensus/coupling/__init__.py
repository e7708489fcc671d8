"""Coupling: consensus training of any model with any optimizer, in the user's own loop."""

from consensus.coupling.coupling import Coupling

__all__ = ["Coupling"]
