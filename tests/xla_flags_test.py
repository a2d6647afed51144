"""The settings of XLA under which the package's programs run compute what the reference does, in every process.

One setting, which sets XLA:CPU's library to fuse matrix products, gave a deep memory other numbers in some processes
and not in others: what is computed is compared in processes of their own. Run with
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT, the tests of jaxlib 0.10.2 fail.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax import memory
from mc_jax.models.norms import l2_normalize

ROOT = pathlib.Path(__file__).parent.parent
AGGREGATIONS = ("none", "grm", "soup")
COMPUTE = """
import sys
import mc_jax.xla_flags
import numpy as np
from tests.xla_flags_test import answers
np.savez(sys.argv[1], **answers("xla"))
"""


def answers(implementation):
  """{aggregation: what a deep memory answers}, of many small states, with one program for each."""
  rule = memory.rules.get("titans", chunk=4)
  *keys, key = jax.random.split(jax.random.key(0), 5)
  q, k, v, u = (jax.random.normal(key, (8, 64, 4, 8)) for key in keys)
  gates = {name: jnp.full(q.shape[:3], {"alpha": 0.98, "beta": 0.9, "eta": 0.1}[name]) for name in rule.gates}
  arrays = l2_normalize(q), l2_normalize(k), v, u, gates, rule.init(key, heads=4, head_dim=8)
  told = dict(rule=rule, segmentation=memory.segments.constant(4), carry="independent", implementation=implementation)

  def answer(aggregation):
    return jax.jit(lambda arrays: memory.memory_caching(*arrays, aggregation=aggregation, **told))(arrays)

  return {name: np.asarray(answer(name)) for name in AGGREGATIONS}


@pytest.fixture(scope="module")
def expected():
  return answers("reference")


@pytest.mark.slow
@pytest.mark.parametrize("process", range(3))
def test_every_process_computes_what_the_reference_does(process, expected, tmp_path):
  path = tmp_path / f"{process}.npz"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  subprocess.run([sys.executable, "-c", COMPUTE, str(path)], check=True, env=environment, timeout=300)
  with np.load(path) as found:
    for name in AGGREGATIONS:
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
