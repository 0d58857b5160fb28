"""The prefill role: computes prompts in chunks and pushes their KV blocks to decode workers."""
