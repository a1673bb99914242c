"""Tests run on the CPU, with two devices so that sharded code is really sharded."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
# Most of the time of a test goes into compiling what runs once: a third of it with these. The docstring examples by
# themselves (`pytest jaxseq`) run what users run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):  # later ones do not know the flag, and stop
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)
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
