"""The layer around the memories: what published models do between tokens and a rule, as a table.

A form is data. `memory_caching.py` reads its fields and never its name; a form of your own is an entry:

    forms.register("mine", forms.Form(output_gate="sigmoid"))

after which model.memory.form=mine names it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from mc_jax.models.published_gates import Activated, Decay, Horizons, Parametrisation

if TYPE_CHECKING:
  from mc_jax.models.memory_config import MemoryConfig

DEFAULT = "memory_caching"  # the form of rules that have none of their own


@dataclasses.dataclass(frozen=True)
class Form:
  """What a layer does around its memories.

  Attributes:
    convolution: queries, keys and values go through a short causal convolution and SiLU; if not, they are linear maps.
    convolution_bias: the convolutions have a bias.
    unit_keys: queries and keys have unit length in each head.
    query_scale: queries are multiplied by key_dim^-0.5 before they read.
    rotary: base of the rotary positions of queries, keys and connectors; None: there are none.
    expand_v: width of a value, in widths of a key.
    key_heads: heads of queries and keys, which memories share evenly; None: model.heads.
    output_gate: activation of the output gate; None: there is none.
    gate_rank: "head": the output gate's map goes through a layer as narrow as a value, and has a bias; None: it is a
      plain linear map.
    norm: of what the memories answer: RMSNorm of each "head", LayerNorm without bias of each head ("layer"), or RMSNorm
      over all memories that share a query ("group").
    gate_first: the norm is taken of the answer times the output gate, not of the answer.
    skip: values times a learned number for each memory are added to what it answers.
    gates: how the rule's gates are made, see published_gates.py. A gate that is not here starts where the rule says
      (token_gates.py); one that the rule does not have is not made.
  """

  convolution: bool = True
  convolution_bias: bool = False
  unit_keys: bool = True
  query_scale: bool = False
  rotary: float | None = None
  expand_v: float = 1.0
  key_heads: int | None = None
  output_gate: Literal["silu", "sigmoid"] | None = "silu"
  gate_rank: Literal["head"] | None = None
  norm: Literal["head", "layer", "group"] = "head"
  gate_first: bool = False
  skip: bool = False
  gates: tuple[Parametrisation, ...] = ()


# Forms with the names of rules are those rules' own. Each was compared with the authors' code or, where it says fla,
# with flash-linear-attention's layers. RetNet's scale of keys is one of queries here: a read is linear in both.
_XLSTM = Form(
  convolution=False,
  unit_keys=False,
  query_scale=True,
  expand_v=2.0,
  output_gate="sigmoid",
  norm="layer",
  gates=(
    Activated("alpha", cap=15.0, bias=(3.0, 6.0), spread=0.0),
    Activated("eta", "exp", cap=15.0, bias=(-10.0, -10.0), spread=0.0),
  ),
)

FORMS: dict[str, Form] = {
  DEFAULT: Form(),  # arXiv:2602.24281, section 3
  "retnet": Form(  # arXiv:2307.08621; fla
    convolution=False, unit_keys=False, query_scale=True, rotary=10000.0, expand_v=2.0, gates=(Horizons(),)
  ),
  "mamba2": Form(  # arXiv:2405.21060; state-spaces/mamba
    convolution_bias=True,
    unit_keys=False,
    expand_v=2.0,
    key_heads=1,
    norm="group",
    gate_first=True,
    skip=True,
    gates=(Decay(step="eta"),),
  ),
  "gla": Form(  # arXiv:2312.06635; fla
    convolution=False,
    unit_keys=False,
    query_scale=True,
    expand_v=2.0,
    gates=(Activated("alpha", power=1 / 16, bias=(0.0, 0.0), rank=16),),
  ),
  "deltanet": Form(query_scale=True, output_gate=None, gates=(Activated("eta"),)),  # arXiv:2406.06484; fla
  "gated_deltanet": Form(  # arXiv:2412.06464; fla, Qwen3-Next
    query_scale=True, expand_v=2.0, gates=(Decay(rates=(0.0, 16.0)), Activated("eta"))
  ),
  "kda": Form(  # arXiv:2510.26692; fla
    query_scale=True, output_gate="sigmoid", gate_rank="head", gates=(Decay(rank="head"), Activated("eta"))
  ),
  "gdn2": Form(query_scale=True, output_gate="sigmoid", gate_rank="head", gates=(Decay(rank="head"),)),
  "mlstm": _XLSTM,  # xLSTM 7B, arXiv:2503.13427
  "mlstm_sigmoid": dataclasses.replace(  # arXiv:2503.14376: the input gate is a sigmoid
    _XLSTM, gates=(_XLSTM.gates[0], Activated("eta", cap=15.0, bias=(-10.0, -10.0), spread=0.0))
  ),
}


def register(name: str, form: Form) -> None:
  """Adds a form; model.memory.form can name it, and a rule of the same name has it by default.

  Raises:
    ValueError: the name is taken.
  """
  if name in FORMS:
    raise ValueError(f"there is a form {name!r} already; names are {', '.join(FORMS)}")
  FORMS[name] = form


def of(config: MemoryConfig) -> Form:
  """The form of a layer: the one that is named, or the rule's own, or the default."""
  return FORMS[config.form or (config.rule if config.rule in FORMS else DEFAULT)]
