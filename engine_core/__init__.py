"""The engine: what prefill and decode workers share. It knows nothing of Ray, HTTP or roles.

Host modules (numpy at most): `types`, `config`, `config_fields`, `config_loader`, `errors`, `messages`, `block_hash`,
`page_pool`, `prefix_cache`, `sequence`.
Device modules (jax): `mesh`, `kv_cache`, `step`, `sampling`, `layers`, `models`, `weights`, `kernels`.
Both: `batch` (the only host-to-device copy), `engine` (params, cache, the only device-to-host copy).
"""
