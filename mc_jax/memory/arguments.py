"""Checks of `memory_caching`'s arguments: wrong ones are refused by name before anything is traced."""

import jax
import jax.numpy as jnp

from mc_jax.memory import segments
from mc_jax.memory.networks import Weights
from mc_jax.memory.rules import Rule


def one_of(name: str, value: object, valid: tuple) -> None:
  """Raises ValueError, listing the valid values, unless value is one of them."""
  if value not in valid:
    raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}; got {value!r}")


def at_least_one(name: str, value: int) -> None:
  """Raises ValueError unless value >= 1."""
  if not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_arrays(
  tokens: dict[str, jax.Array],
  gates: dict[str, jax.Array],
  init: Weights,
  rule: Rule,
  segmentation: segments.Segmentation,
  gate: str,
  segment_ids: jax.Array | None,
  token_scores: jax.Array | None,
) -> None:
  """Checks the arrays' shapes and dtypes against each other. tokens: {"q": ..., "k": ..., "v": ..., "u": ...}."""
  shape = tokens["q"].shape
  if len(shape) != 4 or 0 in shape:
    raise ValueError(f"q must be [batch, length, heads, head_dim], none of them 0; got shape {shape}")
  for name, x in tokens.items():
    if x.shape != shape:
      raise ValueError(f"{name} must have q's shape {shape}; got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point; got {x.dtype}")
  batch, length, heads, _ = shape
  if set(gates) != set(rule.gates):
    raise ValueError(f"rule {rule.name!r} needs gates {list(rule.gates)}; got {sorted(gates)}")
  for name, x in gates.items():
    if x.shape != (batch, length, heads):
      raise ValueError(f"gates[{name!r}] must be [batch, length, heads] = {(batch, length, heads)}; got {x.shape}")
  if set(init) != (names := set(jax.eval_shape(lambda: rule.init(jax.random.key(0), heads=1, head_dim=shape[3])))):
    raise ValueError(f"init must have rule {rule.name!r}'s weights {sorted(names)}; got {sorted(init)}")
  for name, w in init.items():
    if w.ndim != 3 or w.shape[0] != heads:
      raise ValueError(f"init[{name!r}] must be [heads, in, out] with {heads} heads; got {w.shape}")
  if segment_ids is not None:
    if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise ValueError(
        f"segment_ids must be integers [batch, length] = {(batch, length)}; got {segment_ids.dtype} {segment_ids.shape}"
      )
    if isinstance(segmentation, segments.Logarithmic):
      raise ValueError(
        "segment_ids (packed documents) need segmentation constant: logarithmic cuts by the row's length"
      )
  if gate == "token":
    caches = len(segmentation.lengths(length))
    got = None if token_scores is None else token_scores.shape
    if got is None or len(got) != 4 or got[:3] != (batch, length, heads) or got[3] < caches:
      raise ValueError(
        f"gate='token' needs token_scores [batch, length, heads, ages] = {(batch, length, heads)} with at least "
        f"{caches} ages, one a segment; got {got}"
      )
