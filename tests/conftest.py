"""Settings that every test shares; they must be in place before jax starts."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Meshes of up to 8 devices can be made in every test; what names no mesh runs on the first of them, as before.
jax.config.update("jax_num_cpu_devices", 8)
# Compiling dominates the tests: keep what was compiled from one run to the next (git-ignored).
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """What one file compiled is of no use to the next, and gigabytes in all."""
  yield
  jax.clear_caches()


@pytest.fixture
def float64():
  """The test runs in float64."""
  with jax.enable_x64(True):
    yield
