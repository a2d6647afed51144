"""mLSTM against its authors' PyTorch functions: pip install mlstm_kernels torch. They compute in float64, if told so.

They divide by max(|q n|, e^-m) + eps, we by the maximum: eps=0 here. Theirs of 1e-6 is relative to e^-m, so it shows
most where input gates are small. Gates are logits: the forget gate's a sigmoid's, the input gate's an exponential's.
"""

import numpy as np
import oracles
import pytest

from mc_jax.memory import rules

torch = pytest.importorskip("torch", reason="pip install mlstm_kernels torch")
pytest.importorskip("mlstm_kernels", reason="pip install mlstm_kernels torch")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

FLOAT64 = 1e-9


def heads_first(x):
  return (t.transpose(1, 2) for t in (x["q"] * x["q"].shape[-1] ** 0.5, x["k"], x["v"], *logits(x["gates"])))


def logits(gates):
  return gates["eta"].log(), gates["alpha"].logit()


def recurrent(x):
  from mlstm_kernels.torch.recurrent.native_sequence import mlstm_recurrent_sequence__native_fw as run

  state = x["init"]
  start = dict(c_initial=state["w"], n_initial=state["n"][..., 0], m_initial=-state["floor"][..., 0].log())
  return run(*heads_first(x), **start, eps=0.0, dtype_state=torch.float64).transpose(1, 2)


def parallel(x):
  from mlstm_kernels.torch.parallel.native.fw import mlstm_parallel_fw as run

  return run(*heads_first(x), eps=0.0)[0].transpose(1, 2)


@pytest.mark.parametrize("oracle", [recurrent, parallel])
def test_mlstm_is_its_authors(oracle):
  rule = rules.get("mlstm", chunk=oracles.CHUNK)
  x = oracles.inputs(rule, fresh=oracle is parallel)
  x["gates"]["eta"] = np.exp(np.random.default_rng(2).normal(size=x["gates"]["eta"].shape) * 3)
  unread = ("n", "floor", "w") if oracle is parallel else ()
  oracles.assert_equal(rule, oracle, x, rtol=FLOAT64, dtype=torch.float64, unread=unread)
