"""Ablations: a grid of models, each trained and evaluated from several seeds, and one report of them all.

`grid` turns --grid and --seeds into `Cell`s, one training configuration each. `runner` makes a `Job` of every cell,
runs mc_jax.train and mc_jax.evaluate for it in processes of their own, resumes what was stopped, and collects the
results of finished cells. `report` averages them over seeds into tables, JSON, CSV and plots. The door is
mc_jax.ablate.
"""
