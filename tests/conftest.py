"""Tests run on the CPU, with two devices so that sharded code is really sharded."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What a file has compiled is no use to the next, and adds up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def float64():
    """Float64 by default, for files that say `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield
