"""Model definitions: `spec` (what a config.json says), `decoder` (Flax NNX modules), `registry` (architecture -> model)."""
