"""Moving KV blocks between workers: control channel, tickets, wire format, transports."""
