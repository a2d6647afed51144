"""Settings that every test shares; they must be in place before jax starts."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# Compiling dominates the tests: keep what was compiled from one run to the next (git-ignored).
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
