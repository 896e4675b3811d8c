"""What tests of several modules share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with two logical CPUs, the same for all tests that use it."""
    from leafnet import cluster
    from leafnet.config import RaySettings

    with cluster.session(RaySettings(cpus=2)):
        yield
