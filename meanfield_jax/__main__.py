"""``python -m meanfield_jax``: the command line."""

from meanfield_jax.cli import main

raise SystemExit(main())
