"""Compiling for TPUs that are not there: `generation` and `topology` name them, `compiler` drives libtpu."""
