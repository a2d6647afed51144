"""Data: documents and recall tasks, as batches of tokens on a mesh.

`datasets` builds everything that a run reads from its `config`. Windows of text come from `sources` and `windows`.
Otherwise `files` and `folders` find the files, `formats` divides them into blocks, `documents` reads, tokenizes
(`tokenizers`) and orders their documents, and `packing` fills rows with them; `recall` generates the rows of tasks.
`streams` mixes the rows of several sources, and `loader` turns them into batches for every process, with `workers`.
`identity` records in a checkpoint which data were read; `ngram` is the baseline that losses are compared with.

The program `prepare` tokenizes a corpus once: `learning` trains the tokenizer, `preparation` writes the shards,
`manifests` describes them, and `lock` keeps other processes out of the folder.
"""

from mc_jax.data import datasets, loader, ngram, recall, sources, tokenizers, windows
from mc_jax.data.config import DataConfig, PackingConfig, PartConfig

__all__ = [
  "DataConfig",
  "PackingConfig",
  "PartConfig",
  "datasets",
  "loader",
  "ngram",
  "recall",
  "sources",
  "tokenizers",
  "windows",
]
