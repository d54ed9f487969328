"""``python -m meanfield_jax`` is the command line."""

from meanfield_jax.cli import entry

entry()
