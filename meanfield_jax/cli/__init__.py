"""The command line, ``meanfield-jax COMMAND``: one file per command; program.py lists them.

Exit status: 0 done, 1 a computation or a file failed, 2 the command was not valid. An error is one
line on stderr; with ``--json`` stdout has the result and nothing else.
"""

from meanfield_jax.cli.program import entry, main

__all__ = ["entry", "main"]
