"""Programs that measure: `python -m mc_jax.bench.NAME --help`. Nothing else in the package imports them.

Speed: `layer` trains one layer, `decode` steps a model at long contexts (its timed loops are in `decode_steps`), `data`
reads batches, `probe` looks into the memories during training, `values` reads rows of a table, `peer` trains another
library's layer. Compilation: `schedule` reads how a TPU's compiler schedules the kernels of `kernel_cases`. Accuracy:
`stored_pairs` and `learned_pairs` measure what a memory stores of a segment, `cache_errors` what a cache's dtype costs,
`long_stream` the drift of a bounded cache, `meshes` how a model on a mesh differs from one on a single device, and
`mqar_statistics` how MQAR's rows compare with their definition.
"""
