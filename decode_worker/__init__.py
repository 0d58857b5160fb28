"""The decode role: receives KV blocks and generates tokens under the overlap scheduler."""
