"""Results of the command line, read strictly."""

import json

import jsonschema

from meanfield_jax.cli.result import RESULTS


def parsed(command: str, text: str) -> dict:
    """What ``--json`` printed, if it follows the command's schema and has no NaN."""
    result = json.loads(text, parse_constant=_refuse)
    schema = RESULTS[command].schema(command)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(result)
    return result


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
