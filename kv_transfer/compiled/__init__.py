"""The digests of blocks, compiled where there is a C++ compiler: `kv_transfer.digester` is their definition."""
