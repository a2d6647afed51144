"""Data: documents and recall tasks, as batches of tokens on a mesh.

`datasets` makes everything a run reads from its `config`. Text files in windows go through `sources` and `windows`.
Otherwise `files` and `folders` find the files, `formats` divides them into blocks, `documents` reads and orders their
documents through `tokenizers`, and `packing` fills rows with them; `recall` generates rows of tasks. `streams` mixes
the rows of several sources, and `loader` turns them into batches for every process, with `workers`. `identity` is what
a checkpoint remembers of the data, `ngram` the reference that a run is compared with. The program `prepare` tokenizes a
corpus once: `learning` trains the tokenizer, `preparation` writes the shards, `manifests` describes them, and `lock`
keeps other processes out of the folder.
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
