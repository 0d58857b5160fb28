"""Models: `spec` (what a config.json says), `registry` (architecture -> model), `decoder` (Flax NNX modules)."""
