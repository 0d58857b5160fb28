"""A cluster in virtual time: the router's real code against simulated workers. Deterministic from a seed; no jax.

`trace` and `synthesis` say what is asked, `profile` how fast workers are, `cluster` plays it, `report` counts.
"""
