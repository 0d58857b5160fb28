"""The OpenAI-compatible gateway and the placement of requests on workers. Never imports jax or ray."""
