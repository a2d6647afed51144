"""What tokens bring to their memories: one record, from the layer that makes it to the chunk step that writes it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import networks, segments
from mc_jax.memory.arithmetic import state_dtype
from mc_jax.memory.documents import Documents
from mc_jax.memory.networks import Weights
from mc_jax.memory.options import Options


class Tokens(NamedTuple):
  """A batch of sequences as the layer has them, [batch, length, heads, ...]; inside, [batch, heads, length, ...].

  Attributes:
    q, k: queries and keys [batch, length, heads, head_dim]. (In a soup's layers q is as wide as the layer.)
    v: values [batch, length, heads, value_dim], as wide as the answers of the memory's network: any width if it is a
      matrix, head_dim if it is an MLP.
    u: connectors, the gates' queries, like q.
    gates: positive values, not logits: {name: [batch, length, heads]}, or [batch, length, heads, head_dim] where the
      rule's gate is one per channel.
    documents: arrays [batch, length] (inside, [batch, 1, length]), from `documents.index`; None: a row is one.
    token_scores: [batch, length, heads, ages], for gate="token": scores by a memory's age in segments, 0 is online.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  u: jax.Array
  gates: dict[str, jax.Array]
  documents: Documents | None = None
  token_scores: jax.Array | None = None


def check(tokens: Tokens, init: Weights, options: Options) -> None:
  """Raises ValueError, naming the argument, where shapes and dtypes do not fit each other and the options."""
  rule, shape = options.rule, tokens.q.shape
  if len(shape) != 4 or 0 in shape:
    raise ValueError(f"q must be [batch, length, heads, head_dim], none of them 0; got shape {shape}")
  for name in "qkvu":
    x = getattr(tokens, name)
    if name != "v" and x.shape != shape:
      raise ValueError(f"{name} must have q's shape {shape}; got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point; got {x.dtype}")
  batch, length, heads, head_dim = shape
  if set(tokens.gates) != set(rule.gates):
    raise ValueError(f"rule {rule.name!r} needs gates {list(rule.gates)}; got {sorted(tokens.gates)}")
  for name, gate in rule.gates.items():
    axes, expected = "[batch, length, heads]", (batch, length, heads)
    if gate.per_channel:
      axes, expected = "[batch, length, heads, head_dim]", shape
    if tokens.gates[name].shape != expected:
      raise ValueError(f"gates[{name!r}] must be {axes} = {expected}; got {tokens.gates[name].shape}")
  names = set(jax.eval_shape(lambda: rule.init(jax.random.key(0), heads=1, head_dim=head_dim)))
  if set(init) != names:
    raise ValueError(f"init must have rule {rule.name!r}'s weights {sorted(names)}; got {sorted(init)}")
  for name, w in init.items():
    if w.ndim != 3 or w.shape[0] != heads:
      raise ValueError(f"init[{name!r}] must be [heads, in, out] with {heads} heads; got {w.shape}")
  expected = *shape[:3], networks.value_dim(rule.network, init, head_dim)
  if tokens.v.shape != expected:
    raise ValueError(
      f"v must be [batch, length, heads, value_dim] = {expected}, as wide as the answers of init's weights; got "
      f"{tokens.v.shape}"
    )
  if tokens.documents is not None:
    if tokens.documents.number.shape != (batch, length):
      raise ValueError(
        f"segment_ids must be integers [batch, length] = {(batch, length)}; got shape {tokens.documents.number.shape}"
      )
    if isinstance(options.segmentation, segments.Logarithmic):
      raise ValueError(
        "segment_ids (packed documents) need segmentation constant: logarithmic cuts by the row's length"
      )
  if options.gate == "token":
    caches = len(options.segmentation.lengths(length))
    got = None if tokens.token_scores is None else tokens.token_scores.shape
    if got is None or len(got) != 4 or got[:3] != (batch, length, heads) or got[3] < caches:
      raise ValueError(
        f"gate='token' needs token_scores [batch, length, heads, ages] = {(batch, length, heads)} with at least "
        f"{caches} ages, one a segment; got {got}"
      )


def heads_first(tokens: Tokens) -> Tokens:
  """[batch, length, heads, ...] to [batch, heads, length, ...], gates at least float32.

  What padding brings is dropped here, by selects.
  """
  q, k, v, u, gates, documents, token_scores = tokens
  if documents is not None:
    q, k, v, u = (_where_valid(documents, x, 0) for x in (q, k, v, u))
    gates = {name: _where_valid(documents, g, 1) for name, g in gates.items()}
    token_scores = token_scores if token_scores is None else _where_valid(documents, token_scores, 0)
    documents = Documents(*(x[:, None] for x in documents))
  gates = {name: g.astype(state_dtype(q.dtype)) for name, g in gates.items()}
  q, k, v, u, gates, token_scores = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), (q, k, v, u, gates, token_scores))
  return Tokens(q, k.astype(q.dtype), v.astype(q.dtype), u, gates, documents, token_scores)


def _where_valid(documents: Documents, x: jax.Array, otherwise: float) -> jax.Array:
  """x [batch, length, heads, ...], something else at padding."""
  return jnp.where(documents.valid.reshape(*documents.valid.shape, *[1] * (x.ndim - 2)), x, otherwise)
