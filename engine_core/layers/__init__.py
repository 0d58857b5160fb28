"""Building blocks of models: norms, rotary embedding, linear projections, attention, MLP."""
