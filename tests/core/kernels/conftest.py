"""The functions of native.c, for the tests that need them."""

import pytest

from consensus.core.kernels import native


@pytest.fixture(scope="session")
def library():
    found = native.library()
    if found is None:
        pytest.skip("no C compiler")
    return found
