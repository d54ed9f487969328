"""The command line, ``meanfield-jax COMMAND``: one file per command; program.py lists them.

Exit status: 0 done, 1 a computation or a file failed, 2 the command was not valid, 130 interrupted
(Ctrl-C), 143 terminated. An error is one line on stderr. With ``--json`` stdout has the result and
nothing else, in the form that ``meanfield-jax schema COMMAND`` prints as a JSON Schema.
"""

from meanfield_jax.cli.start import entry, main

__all__ = ["entry", "main"]
