"""Compiler options for tests, which compile hundreds of programs and run each of them for milliseconds.

Without the optimiser a program is compiled in half of the time and differs by rounding only.
"""

import functools

import jax

_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_parallel_codegen_split_count": 1,
  "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def options() -> dict[str, object]:
  """Those of the options above that the installed compiler has: an unknown one is an error, and they come and go."""
  return {name: value for name, value in _QUICK.items() if _known(name, value)}


def _known(name, value) -> bool:
  try:
    jax.jit(lambda x: x).lower(0).compile({name: value})
  except jax.errors.JaxRuntimeError as error:
    if "No such compile option" not in str(error):
      raise
    return False
  return True


def jit(function, **options_of_jit):
  """jax.jit with the options."""
  return jax.jit(function, compiler_options=options(), **options_of_jit)
