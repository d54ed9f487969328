"""The spectral density of the Fisher matrix by 90 Lanczos steps, in a fresh process.

The network is case A of fisher_lambda_max.py. What counts is the first call with imports done:
a density is computed once for a network. curvlinops is given the bounds of the spectrum, which it
would otherwise find by further Lanczos runs. Ritz values at the upper end are the check that all
describe the same matrix; densities themselves differ by convention (curvlinops averages over the
parameters, nearly all of whose eigenvalues vanish; the package over the n C non-trivial ones).

Run: ``python spectral_density.py [--quick]``. The exit status is 1 when a claim is false.
"""

import argparse
import sys
from typing import Any

from common import Claim, Peer, compare, worker
from summary import finish

NUM_STEPS = 90
CURVLINOPS = "curvlinops, bounds given"
MATFREE = "matfree, F v"
MATFREE_DUAL = "matfree, J J^T u by hand"


def make_peers(largest: float, quick: bool) -> list[Peer]:
    """The package first."""
    steps = dict(num_steps=NUM_STEPS)
    colds = 1 if quick else 2
    return [
        Peer("meanfield_jax", "peers:meanfield_density", steps, colds=colds),
        Peer(CURVLINOPS, "peers:curvlinops_density", dict(steps, largest=largest), colds=colds),
        Peer(MATFREE_DUAL, "peers:matfree_density", dict(steps, parameter_space=False)),
        Peer(
            MATFREE,
            "peers:matfree_density",
            dict(steps, parameter_space=True),
            timeout=240,
        ),
        Peer("PyHessian", "peers:pyhessian_density", dict(num_steps=3)),
    ]


def make_claims(peers: list[Peer]) -> list[Claim]:
    """What is claimed."""
    named: dict[str, dict[str, Any]] = {peer.name: peer.record() for peer in peers}
    error = named["meanfield_jax"].get("error")
    return [
        Claim(f"cold calls faster than {CURVLINOPS}, times", named[CURVLINOPS]["cold_ratio"], 1.5),
        Claim("top Ritz value's relative error", error, 1e-4, at_least=False),
    ]


def main() -> int:
    """Measures, prints, writes results/spectral_density.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one cold call of each peer")
    options = parser.parse_args()
    with worker("peers:curvlinops_eigsh_dual", dict(case="A", tol=1e-9, double=True)) as process:
        truth = process.run()["value"]
    peers = make_peers(truth, options.quick)
    compare(peers, dict(case="A"), rounds=0)
    for peer in peers:
        if peer.result:
            peer.result["error"] = abs(peer.result["top"] / truth - 1)
    body = dict(num_steps=NUM_STEPS, reference=truth, peers=[peer.record() for peer in peers])
    return finish("spectral_density", body, make_claims(peers))


if __name__ == "__main__":
    sys.exit(main())
