"""Imported first by the fork server: garbage is collected again at the end of warm.py."""

import gc

gc.disable()
