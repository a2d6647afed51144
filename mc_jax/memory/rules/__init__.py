"""Memory rules: how a memory writes (arXiv:2602.24281, section 4.3). A family is a file; here they have names.

Gradient steps on a network's inner loss (gradient.py):

| rule   | network | inner loss     | alpha | beta | eta          | equations |
|--------|---------|----------------|-------|------|--------------|-----------|
| linear | matrix  | -<M(k), v>     |       |      | 1            | 2, 12     |
| swla   | matrix  | -<M(k), v>     | yes   |      | window gates | 26-29     |
| dla    | MLP     | -<M(k), v>     | yes * |      | a gate       | 30-33     |
| titans | MLP     | ||M(k) - v||^2 | yes   | yes  | a gate       | 34-36     |

Matrices that are exact at every chunk length (delta.py; mlstm.py): what people build recurrent models of.

| rule              | writes                | alpha       | eta         | source           |
|-------------------|-----------------------|-------------|-------------|------------------|
| retnet            | the value             | by head     | 1           | arXiv:2307.08621 |
| mamba2            | the value             | by head     | by head     | arXiv:2405.21060 |
| gla               | the value             | by channel  | 1           | arXiv:2312.06635 |
| deltanet          | the error             |             | by head     | arXiv:2406.06484 |
| gated_deltanet    | the error after decay | by head     | by head     | arXiv:2412.06464 |
| kda               | the error after decay | by channel  | by head     | arXiv:2510.26692 |
| gdn2              | the error after decay | by channel  | by channel  | arXiv:2605.22791 |
| rwkv7             | value, and an erasure | by channel  | by channel  | arXiv:2503.14456 |
| momentum_deltanet | momentum of the error | by head     | by head     | arXiv:2501.00663 |
| mlstm             | the value, normalised | by head     | by head     | arXiv:2405.04517 |

(*) not in the paper: dla as printed climbs an unbounded loss without retention, and diverges.
`get("dla", retention=False, max_grad_norm=None)` is the printed form.

A rule of your own is a file with a subclass of `Rule`, and `register("its name", function)`.
"""

import inspect
from collections.abc import Callable

from mc_jax.memory.rules import delta, gradient, mlstm
from mc_jax.memory.rules.delta import MatrixRule
from mc_jax.memory.rules.gradient import GradientRule, dot_loss, squared_loss
from mc_jax.memory.rules.rule import Gate, GateInit, Online, Rule, State

__all__ = [
  "Gate",
  "GateInit",
  "GradientRule",
  "MatrixRule",
  "Online",
  "Rule",
  "State",
  "dot_loss",
  "get",
  "names",
  "options",
  "register",
  "squared_loss",
]

_RULES: dict[str, Callable[..., Rule]] = {
  "linear": gradient.linear,
  "swla": gradient.swla,
  "dla": gradient.dla,
  "titans": gradient.titans,
  "retnet": delta.retnet,
  "mamba2": delta.mamba2,
  "gla": delta.gla,
  "deltanet": delta.deltanet,
  "gated_deltanet": delta.gated_deltanet,
  "kda": delta.kda,
  "mlstm": mlstm.mlstm,
  "momentum_deltanet": delta.momentum_deltanet,
  "gdn2": delta.gdn2,
  "rwkv7": delta.rwkv7,
}


def register(name: str, make: Callable[..., Rule]) -> None:
  """Gives a rule a name, by which configurations and `get` find it.

  Args:
    name: its name.
    make: returns the rule; its keyword arguments are the options of `get`. Those that have the name of a field of a
      model's configuration (chunk, depth, ...) are set by it.

  Raises:
    ValueError: the name is taken.
  """
  if name in _RULES:
    raise ValueError(f"there is a rule {name!r} already; names are {', '.join(_RULES)}")
  _RULES[name] = make


def names() -> tuple[str, ...]:
  """The rules that there are."""
  return tuple(_RULES)


def options(name: str) -> tuple[str, ...]:
  """The options that `get(name, ...)` takes."""
  if name not in _RULES:
    raise ValueError(f"rule must be one of {', '.join(names())}; got {name!r}")
  return tuple(inspect.signature(_RULES[name]).parameters)


def get(name: str, **opts) -> Rule:
  """The rule called `name`, with options such as chunk=64, expansion=4.

  Raises:
    ValueError: no such rule, or an option that it does not take; the message lists the valid ones.
  """
  unknown = sorted(set(opts) - set(options(name)))
  if unknown:
    raise ValueError(f"rule {name!r} takes {', '.join(options(name))}; got {', '.join(unknown)}")
  return _RULES[name](**opts)
