"""How a user of each library computes the quantity; one setup function a peer.

A setup function does what is not timed: imports, model, inputs. It returns the timed callable,
which starts from the model and the inputs and ends with numbers on the host. Peers of the largest
eigenvalue return ``value`` and ``products`` (with the Fisher matrix or its dual), those of the
density ``top``, the largest Ritz value, and ``products``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from networks import CASES, NUM_OUTPUTS, Case, draw_inputs, jax_model, torch_inputs, torch_model

Solve = Callable[[], dict[str, Any]]


# The package.


def meanfield(case: str, tol: float = 1e-4) -> Solve:
    """meanfield_jax: the operator is made anew in every call."""
    import jax.numpy as jnp

    import meanfield_jax as mf

    model, inputs = jax_model(CASES[case]), jnp.asarray(draw_inputs(CASES[case]))

    def solve() -> dict[str, Any]:
        operator = mf.fisher_operator(model, inputs, statistics="batch")
        result = mf.top_eigenvalues(operator, k=1, tol=tol)
        products = int(result.num_matvecs)
        return dict(value=float(result.eigenvalues[0]), products=products)

    return solve


def meanfield_density(case: str, num_steps: int) -> Solve:
    """meanfield_jax: the density of the operator's spectrum."""
    import jax
    import jax.numpy as jnp

    import meanfield_jax as mf

    model, inputs = jax_model(CASES[case]), jnp.asarray(draw_inputs(CASES[case]))

    def solve() -> dict[str, Any]:
        operator = mf.fisher_operator(model, inputs, statistics="batch")
        density = jax.block_until_ready(mf.spectral_density(operator, num_steps=num_steps))
        return dict(top=float(jnp.max(density.nodes)), products=num_steps)

    return solve


# JAX peers. All use the package's pure apply(params, x), so that only the method differs.


def _jax_problem(case: Case) -> tuple[Any, Any, Any]:
    """The pure function of the network, its parameters, and the inputs."""
    import jax.numpy as jnp

    import meanfield_jax as mf

    apply, params = mf.functional(jax_model(case))
    return apply, params, jnp.asarray(draw_inputs(case))


def _top_by_scipy(
    product: Callable[[np.ndarray], np.ndarray], size: int, tol: float, dtype: Any = np.float32
) -> dict[str, Any]:
    """The largest eigenvalue by ARPACK with its default basis, and the products it took."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    count = 0

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return product(vector)

    operator = LinearOperator((size, size), matvec=counted, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(size, dtype=dtype)
    (value,) = eigsh(operator, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    return dict(value=float(value), products=count)


def scipy_eigsh(case: str, tol: float = 1e-4) -> Solve:
    """With scipy's eigsh around a jitted product with F, in parameter space: jvp, then vjp."""
    import jax
    from jax.flatten_util import ravel_pytree

    apply, params, inputs = _jax_problem(CASES[case])
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def product(params: Any, inputs: Any, vector: Any) -> Any:
        def function(params: Any) -> Any:
            return apply(params, inputs)

        _, tangent = jax.jvp(function, (params,), (unravel(vector),))
        _, pullback = jax.vjp(function, params)
        return ravel_pytree(pullback(tangent / len(inputs)))[0]

    def solve() -> dict[str, Any]:
        def multiply(vector: np.ndarray) -> np.ndarray:
            return np.asarray(product(params, inputs, vector.astype(np.float32).ravel()))

        return _top_by_scipy(multiply, flat.size, tol)

    return solve


def scipy_eigsh_dual(case: str, tol: float = 1e-4) -> Solve:
    """With scipy's eigsh around a jitted product with J J^T / n, in output space: vjp, then jvp."""
    import jax

    apply, params, inputs = _jax_problem(CASES[case])
    shape = (len(inputs), NUM_OUTPUTS)

    @jax.jit
    def product(params: Any, inputs: Any, vector: Any) -> Any:
        def function(params: Any) -> Any:
            return apply(params, inputs)

        _, pullback = jax.vjp(function, params)
        gradient = pullback(vector.reshape(shape) / len(inputs))
        _, tangent = jax.jvp(function, (params,), gradient)
        return tangent.ravel()

    def solve() -> dict[str, Any]:
        def multiply(vector: np.ndarray) -> np.ndarray:
            return np.asarray(product(params, inputs, vector.astype(np.float32).ravel()))

        return _top_by_scipy(multiply, shape[0] * shape[1], tol)

    return solve


def _matfree_problem(case: Case, parameter_space: bool) -> tuple[Any, Any, Any, Any]:
    """``product(params, inputs, vector)`` on flat vectors, its two arguments, and a start vector.

    The network is linearized inside the function that multiplies, once a call of it.
    """
    import jax
    from jax.flatten_util import ravel_pytree

    apply, params, inputs = _jax_problem(case)
    flat, unravel = ravel_pytree(params)

    def linearize(params: Any, inputs: Any) -> Callable[[Any], Any]:
        output, forward = jax.linearize(lambda p: apply(p, inputs), params)
        backward = jax.linear_transpose(forward, params)

        def product(vector: Any) -> Any:
            if parameter_space:
                return ravel_pytree(backward(forward(unravel(vector)) / len(inputs)))[0]
            return forward(*backward(vector.reshape(output.shape) / len(inputs))).ravel()

        return product

    size = flat.size if parameter_space else len(inputs) * NUM_OUTPUTS
    return linearize, params, inputs, jax.random.normal(jax.random.key(0), (size,))


def matfree_top(case: str, num_steps: int, parameter_space: bool) -> Solve:
    """With matfree's Lanczos on a linearized product; it must be told the number of steps.

    The product is with F = J^T J / n in parameter space, as in matfree's tutorials, or with the
    dual J J^T / n, by hand.
    """
    import jax
    from matfree import decomp, eig

    linearize, params, inputs, start = _matfree_problem(CASES[case], parameter_space)

    @jax.jit
    def top(params: Any, inputs: Any, start: Any) -> Any:
        eigh = eig.eigh_partial(decomp.tridiag_sym(num_steps))
        values, _ = eigh(linearize(params, inputs), start)
        return values.max()

    return lambda: dict(value=float(top(params, inputs, start)), products=num_steps)


def matfree_density(case: str, num_steps: int, parameter_space: bool) -> Solve:
    """With matfree's Lanczos on a linearized product: nodes and weights of the density."""
    import jax
    from matfree import decomp

    linearize, params, inputs, start = _matfree_problem(CASES[case], parameter_space)

    @jax.jit
    def nodes_weights(params: Any, inputs: Any, start: Any) -> Any:
        result = decomp.tridiag_sym(num_steps)(linearize(params, inputs), start)
        nodes, vectors = jax.numpy.linalg.eigh(result.J_small)
        return nodes, vectors[0] ** 2

    def solve() -> dict[str, Any]:
        nodes, _ = jax.block_until_ready(nodes_weights(params, inputs, start))
        return dict(top=float(nodes.max()), products=num_steps)

    return solve


def matfree_steps(case: str, parameter_space: bool, truth: float, tol: float) -> Solve:
    """Not a peer: the fewest Lanczos steps with which matfree's answer is within ``tol``."""
    import jax

    linearize, params, inputs, start = _matfree_problem(CASES[case], parameter_space)
    product = jax.jit(lambda params, inputs, v: linearize(params, inputs)(v))

    def solve() -> dict[str, Any]:
        basis, images = [np.asarray(start / np.linalg.norm(start))], []
        for num_steps in range(1, 61):
            images.append(np.asarray(product(params, inputs, basis[-1])))
            frame = np.stack(basis)
            top = np.linalg.eigvalsh((frame @ np.stack(images).T).astype(float))[-1]
            if abs(top - truth) <= tol * truth:
                return dict(num_steps=num_steps, value=float(top))
            rest = images[-1]
            for _ in range(2):
                rest = rest - frame.T @ (frame @ rest)
            basis.append(rest / np.linalg.norm(rest))
        raise ArithmeticError(f"not within {tol} after 60 steps")

    return solve


def laplax_lobpcg(case: str, tol: float = 1e-4) -> Solve:
    """With laplax's product with the GGN of the squared error and its LOBPCG.

    Its Hessian of ``"mse"`` is 2, and its factor 1 / n.
    """
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree
    from laplax.curv.ggn import create_ggn_mv
    from laplax.curv.lobpcg import lobpcg_standard

    apply, params, inputs = _jax_problem(CASES[case])
    flat, unravel = ravel_pytree(params)
    start = jax.random.normal(jax.random.key(0), (flat.size, 1))
    data = dict(input=inputs, target=jnp.zeros((len(inputs), NUM_OUTPUTS)))
    count = 0

    def solve() -> dict[str, Any]:
        nonlocal count
        multiply = create_ggn_mv(
            lambda input, params: apply(params, input),
            params,
            data,
            loss_fn="mse",
            vmap_over_data=False,
        )
        product = jax.jit(
            lambda block: jax.vmap(lambda v: ravel_pytree(multiply(unravel(v)))[0], 1, 1)(block)
        )
        values, _, count = lobpcg_standard(product, start, tol=tol, calc_dtype=jnp.float32)
        return dict(value=float(values[0]) / 2, products=int(count))

    return solve


# PyTorch peers.


def _ggn(case: Case) -> Callable[[], tuple[Any, float]]:
    """The GGN of curvlinops for the mean squared error, and the factor between it and F."""
    import curvlinops
    from torch import nn, zeros

    model, inputs = torch_model(case), torch_inputs(case)
    targets = zeros(len(inputs), NUM_OUTPUTS)
    params = list(model.parameters())

    def make() -> tuple[Any, float]:
        operator = curvlinops.GGNLinearOperator(
            model,
            nn.MSELoss(reduction="mean"),
            params,
            [(inputs, targets)],
            check_deterministic=False,
            num_data=len(inputs),
        )
        return operator, NUM_OUTPUTS / 2

    return make


def curvlinops_eigsh(case: str, tol: float = 1e-4) -> Solve:
    """With curvlinops' GGN (the Fisher matrix of the squared error) and scipy's eigsh.

    The checks and the data pass that the constructor makes by default are switched off.
    """
    make = _ggn(CASES[case])

    def solve() -> dict[str, Any]:
        ggn, factor = make()
        matrix = ggn.to_scipy(dtype=np.float32)  # its default, float64, takes more memory
        result = _top_by_scipy(lambda vector: matrix @ vector, matrix.shape[0], tol)
        return dict(result, value=factor * result["value"])

    return solve


def curvlinops_eigsh_dual(case: str, tol: float = 1e-4, double: bool = False) -> Solve:
    """With curvlinops' Jacobian times its transpose and scipy's eigsh: output space by hand.

    In float64 and to the last digit it is also the reference of the benchmark.
    """
    import curvlinops
    from torch import zeros

    model, inputs = torch_model(CASES[case]), torch_inputs(CASES[case])
    if double:
        model, inputs = model.double(), inputs.double()
    data = [(inputs, zeros(len(inputs), NUM_OUTPUTS, dtype=inputs.dtype))]
    params = list(model.parameters())
    options = dict(check_deterministic=False, num_data=len(inputs))

    def solve() -> dict[str, Any]:
        jacobian = curvlinops.JacobianLinearOperator(model, params, data, **options)
        transposed = curvlinops.TransposedJacobianLinearOperator(model, params, data, **options)
        dtype = np.float64 if double else np.float32
        dual = (jacobian @ transposed).to_scipy(dtype=dtype)
        result = _top_by_scipy(lambda vector: dual @ vector, dual.shape[0], tol, dtype)
        return dict(result, value=result["value"] / len(inputs))

    return solve


def curvlinops_density(case: str, num_steps: int, largest: float) -> Solve:
    """With curvlinops' density of the GGN, with the bounds of the spectrum given."""
    from curvlinops import LanczosApproximateSpectrumCached

    make = _ggn(CASES[case])

    def solve() -> dict[str, Any]:
        ggn, factor = make()
        bounds = (0.0, largest / factor)
        cached = LanczosApproximateSpectrumCached(ggn, num_steps, boundaries=bounds)
        cached.approximate_spectrum(num_repeats=1, num_points=1024)
        (nodes, _), *_ = cached._lanczos_iters
        return dict(top=factor * float(nodes.max()), products=num_steps)

    return solve


def _pyhessian(case: Case, running_statistics: bool) -> Callable[[], Any]:
    """PyHessian at labels = outputs, where the Hessian of the squared error is F exactly."""
    import pyhessian
    import torch

    model = torch_model(case, running_statistics=running_statistics)
    inputs = torch_inputs(case)
    with torch.no_grad():
        targets = model.eval()(inputs)  # PyHessian evaluates in eval mode

    def loss(outputs: Any, targets: Any) -> Any:
        return 0.5 * torch.sum((outputs - targets) ** 2) / len(inputs)

    def make() -> Any:
        model.zero_grad(set_to_none=True)  # PyHessian adds to the gradients it finds
        return pyhessian.hessian(model.train(), loss, data=(inputs, targets), cuda=False)

    return make


def pyhessian_power(case: str, tol: float, running_statistics: bool = True) -> Solve:
    """PyHessian's power iteration."""
    import sys

    import torch

    make = _pyhessian(CASES[case], running_statistics)
    module = sys.modules["pyhessian.hessian"]  # the package's own name for it is the class
    original, counter = module.hessian_vector_product, []

    def counted(*arguments: Any) -> Any:
        counter.append(1)
        return original(*arguments)

    module.hessian_vector_product = counted

    def solve() -> dict[str, Any]:
        torch.manual_seed(0)
        counter.clear()
        values, _ = make().eigenvalues(tol=tol, top_n=1)
        return dict(value=float(values[0]), products=len(counter))

    return solve


def pyhessian_density(case: str, num_steps: int) -> Solve:
    """PyHessian's stochastic Lanczos density."""
    make = _pyhessian(CASES[case], running_statistics=True)

    def solve() -> dict[str, Any]:
        (nodes,), _ = make().density(iter=num_steps, n_v=1)
        return dict(top=float(np.max(nodes)), products=num_steps)

    return solve


def eigenthings_lanczos(case: str, num_steps: int) -> Solve:
    """hessian-eigenthings' Lanczos on its GGN; it must be told the number of steps."""
    import hessian_eigenthings as eigenthings
    import torch

    model, inputs = torch_model(CASES[case], running_statistics=False), torch_inputs(CASES[case])
    batch = (inputs, torch.zeros(len(inputs), NUM_OUTPUTS))

    def loss(outputs: Any, targets: Any) -> Any:
        return 0.5 * torch.sum((outputs - targets) ** 2) / len(inputs)

    def solve() -> dict[str, Any]:
        operator = eigenthings.GGNOperator(
            model,
            [batch],
            eigenthings.supervised_forward,
            eigenthings.supervised_loss_of_output(loss),
        )
        result = eigenthings.lanczos(operator, k=1, max_iter=num_steps, which="LA", seed=0)
        return dict(value=float(result.eigenvalues[0]), products=num_steps)

    return solve
