"""The largest eigenvalue of the Fisher matrix to 1e-4: this package and its peers.

F = (1/n) sum_i sum_k grad f_k(x_i) grad f_k(x_i)^T, n = 1000 Gaussian inputs, 10 outputs, float32,
the same weights everywhere. Each peer runs in a process of its own; warm calls alternate with the
package's, so that every ratio comes from two calls side by side. A call starts at the model and
the inputs (the operator is built inside it) and ends with a Python float. Compile time is in the
first call of a fresh process ("cold", imports done) and only there.

Run: ``python fisher_lambda_max.py [--cases A C B] [--rounds 3] [--quick]``. The exit status is 1
when a claim is false.
"""

import argparse
import sys
from typing import Any

from common import Claim, Peer, compare, console, worker
from networks import CASES
from summary import finish

TOLERANCE = 1e-4
MATFREE = "matfree, step count given, F v"
MATFREE_DUAL = "matfree, step count given, J J^T u by hand"
SCIPY = "scipy eigsh, jitted F v"
SCIPY_DUAL = "scipy eigsh, jitted J J^T u by hand"
CURVLINOPS = "curvlinops GGN + eigsh"
CURVLINOPS_DUAL = "curvlinops J J^T by hand + eigsh"
PYHESSIAN = "PyHessian, tol 1e-3 (default)"
PYHESSIAN_FINE = "PyHessian, tol 1e-5"
EIGENTHINGS = "hessian-eigenthings, step count given"
LAPLAX = "laplax GGN + its LOBPCG"
PYHESSIAN_STATELESS = "PyHessian, tol 1e-5, no running statistics"


def make_peers(case: str, steps: list[dict[str, Any]], quick: bool) -> list[Peer]:
    """The package first, then the peers of a case."""
    colds = 3 if case == "A" and not quick else 1
    peers = [
        Peer("meanfield_jax", "peers:meanfield", colds=colds),
        Peer(MATFREE, "peers:matfree_top", steps[0]),
        Peer(MATFREE_DUAL, "peers:matfree_top", steps[1]),
        Peer(SCIPY, "peers:scipy_eigsh", colds=colds),
        Peer(SCIPY_DUAL, "peers:scipy_eigsh_dual"),
        Peer(CURVLINOPS, "peers:curvlinops_eigsh", colds=colds),
        Peer(CURVLINOPS_DUAL, "peers:curvlinops_eigsh_dual"),
        Peer(PYHESSIAN, "peers:pyhessian_power", dict(tol=1e-3)),
        Peer(EIGENTHINGS, "peers:eigenthings_lanczos", dict(num_steps=steps[0]["num_steps"])),
    ]
    if case == "A":  # minutes a call
        peers.append(Peer(LAPLAX, "peers:laplax_lobpcg", rounds=1))
    if case != "B":  # a minute for nothing new
        rounds = 1 if case == "A" else 0
        fine = Peer(PYHESSIAN_FINE, "peers:pyhessian_power", dict(tol=1e-5), rounds=rounds)
        peers.append(fine)
    if CASES[case].batch_norm:
        options = dict(tol=1e-5, running_statistics=False)
        peers.append(Peer(PYHESSIAN_STATELESS, "peers:pyhessian_power", options))
    return peers


def reference(case: str) -> dict[str, Any]:
    """The eigenvalue by curvlinops in float64, and the package's at 1e-7.

    Convolutions take PyTorch minutes in float64: there the reference is in float32 too.
    """
    double = case != "B"
    options = dict(case=case, tol=1e-9 if double else 1e-6, double=double)
    with worker("peers:curvlinops_eigsh_dual", options) as process:
        truth = process.run()["value"]
    with worker("peers:meanfield", dict(case=case, tol=1e-7)) as process:
        ours = process.run()["value"]
    return dict(value=truth, ours=ours, disagreement=abs(ours / truth - 1))


def steps_for_matfree(case: str, truth: float) -> list[dict[str, Any]]:
    """The fewest steps with which matfree meets the tolerance, in both spaces; not timed."""
    found = []
    for parameter_space in (True, False):
        options = dict(case=case, truth=truth, tol=TOLERANCE, parameter_space=parameter_space)
        with worker("peers:matfree_steps", options) as process:
            num_steps = process.run()["num_steps"]
        found.append(dict(parameter_space=parameter_space, num_steps=num_steps))
    return found


def measure(case: str, rounds: int, quick: bool) -> dict[str, Any]:
    """All peers on one case."""
    console.print(f"case {case}: {CASES[case].title}")
    truth = reference(case)
    peers = make_peers(case, steps_for_matfree(case, truth["value"]), quick)
    compare(peers, dict(case=case), rounds if case == "A" else min(rounds, 2))
    for peer in peers:
        if peer.result:
            peer.result["error"] = abs(peer.result["value"] / truth["value"] - 1)
    peer_records = [peer.record() for peer in peers]
    return dict(case=case, title=CASES[case].title, reference=truth, peers=peer_records)


def make_claims(record: dict[str, Any]) -> list[Claim]:
    """What is claimed of a case."""
    case = record["case"]
    peers = {peer["name"]: peer for peer in record["peers"]}
    ours = peers["meanfield_jax"]

    def faster(peer: str, times: float, kind: str = "warm") -> Claim:
        text = f"{case}: {kind}, {peer}, over ours"
        return Claim(text, peers[peer][f"{kind}_ratio"], times)

    claims = [
        Claim(f"{case}: relative error", ours.get("error"), TOLERANCE, at_least=False),
        Claim(
            f"{case}: at tol 1e-7, away from curvlinops in float64",
            record["reference"]["disagreement"],
            1e-5,
            at_least=False,
        ),
    ]
    if case == "A":
        claims += [
            faster(CURVLINOPS, 5),
            faster(PYHESSIAN_FINE, 5),
            faster(SCIPY, 4),
            faster(MATFREE, 1.5),
            faster(MATFREE_DUAL, 1.5),
            faster(SCIPY, 1.8, "cold"),
            faster(CURVLINOPS, 2.8, "cold"),
            Claim("A: peak memory, MB", ours["megabytes"], 700, at_least=False),
        ]
    else:
        claims.append(faster(CURVLINOPS, 2))
    if CASES[case].batch_norm:
        wrong = peers[PYHESSIAN_FINE].get("error")
        claims.append(Claim("C: PyHessian's silent error (it forces eval mode)", wrong, 0.5))
    return claims


def main() -> int:
    """Measures, prints, writes results/fisher_lambda_max.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, one cold call")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    records = [measure(case, rounds, options.quick) for case in options.cases]
    claims = [claim for record in records for claim in make_claims(record)]
    return finish("fisher_lambda_max", dict(tolerance=TOLERANCE, cases=records), claims)


if __name__ == "__main__":
    sys.exit(main())
