"""Planning: whether a run fits TPUs and how fast it will be, known before they are rented.

`plans` compiles the real training step for a `topology` that the machine does not have and turns it into a `Plan`:
bytes per chip from the compiler, and FLOPs, traffic and time from `hlo_cost`, which reads the optimised HLO through
`hlo` and divides by what `parallel.chips` says a chip can do. `sweep` ranks mesh shapes, lengths and segment lengths,
and plans the most promising; `report` prints plans. The door is mc_jax.plan.
"""
