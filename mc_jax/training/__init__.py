"""Training: a run from its configuration to its report.

What trains: `config` is the whole configuration, `state` the parameters and moments on a mesh, `optimizer` AdamW and
its schedule, `step` one compiled update, and `loop` the run, which `distributed` makes one job of several processes.
What guards it: `checkpointing` saves and verifies, `interrupt` stops between two steps, `watchdog` ends a process that
hangs, `faulty` reports steps that are not finite and ends a run that has too many, `replay` dumps such a step and
repeats it, `stability` looks into the memories. What a run leaves: `outputs` is its workdir, `metrics` its records,
`progress` its lines on the terminal, `profiling` its traces, `kept` its tokenizer, `report` and `sampling` its table,
curve and sample; `trained` loads its model again, for the doors mc_jax.evaluate, mc_jax.generate and mc_jax.export, and
`evaluating` hands it to the tasks of evaluation/.
"""
