"""The Fisher information matrix of a network as a linear operator.

F = (1/n) J^T Lambda J acts on the P parameters. Its dual (1/n) Lambda^{1/2} J J^T Lambda^{1/2} acts
on all outputs of a batch and has the same non-zero eigenvalues. The dual's vectors are small
(n C = 10^4 where P = 3 10^6), so its dot products are accurate enough in float32 and
re-orthogonalization costs nothing: eigenvalues, densities and traces are computed in the dual.

A product takes one backward and one forward pass through the network, which is linearized once.

The operator and its dual are one file, because each is defined by the other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from meanfield_jax import precise
from meanfield_jax.checks import array, check_choice, check_tree, whole
from meanfield_jax.empirical.generic import couples_samples
from meanfield_jax.empirical.inputs import check_batch, check_params
from meanfield_jax.empirical.likelihood import LIKELIHOODS, likelihood_factor
from meanfield_jax.empirical.linearized import Product
from meanfield_jax.empirical.loss import curvature, square_root
from meanfield_jax.empirical.mode import MODES, check_mode
from meanfield_jax.empirical.model import Functional, path_name
from meanfield_jax.empirical.operator import SymmetricOperator
from meanfield_jax.empirical.products import jacobian, outer
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.layers.base import is_layer
from meanfield_jax.pytree import pytree, static


@pytree(eq=False, repr=False)
class FisherOperator(SymmetricOperator):
    """The Fisher matrix F = (1/n) sum_i J_i^T Lambda_i J_i of any function ``apply(params, x)``.

    F is a (P, P) matrix. J_i is the Jacobian of the outputs f of sample i. Lambda_i depends on the
    likelihood:

    * ``"gaussian"`` (squared loss): 1;
    * ``"categorical"`` (cross-entropy): diag(p) - p p^T, p = softmax(f) over the last axis;
    * ``"bernoulli"`` (binary cross-entropy, independent logits): diag(p (1 - p)), p = sigmoid(f).

    For any other convex loss it is the loss's Hessian, see :meth:`with_loss`.

    Outputs with further axes, such as (n, T, C) for T tokens, count as T C outputs per sample: F is
    a mean over samples and a sum over tokens.

    Args:
        apply: A pure function of parameters and inputs. For a Flax Linen module see
            :meth:`from_linen`, for an NNX model :func:`fisher_operator`.
        params: Any pytree of real floating-point arrays, P numbers in total.
        x: Inputs: an array (n, ...), or any pytree of arrays whose leading axes run over the n
            samples (tokens, masks, several inputs). It is passed to ``apply`` unchanged.
        likelihood: See above.
        batch_size: Number of samples linearized at a time, which bounds the memory; the network is
            then evaluated again in every product. None: all samples at once.
        output: Index or key of the output to use, where ``apply`` returns a tuple or a dictionary.
            All other outputs are ignored.
        mask: By path, a factor of the derivatives with respect to an array of parameters: 1 if it
            counts and 0 if it does not, see :meth:`block`, or any other, see :meth:`rescaled`.
        dense: Set by :func:`fisher_operator`: paths of the dense layers whose part of the product
            is computed from the Gram matrix of their inputs.
        root: Set by :meth:`with_loss`: the square root of Lambda_i, (n, size, size), which replaces
            that of the likelihood.

    Raises:
        SpecError: if an option cannot be used.
        DataError: if the inputs cannot be used.

    Accuracy:
        Products are in full precision, in at least float32, whatever the model's dtype; they are
        compared with dense Jacobians of random models in tests/test_any_model.py.

    Example:
        >>> import jax, jax.numpy as jnp, meanfield_jax as mf
        >>> apply = lambda params, x: jnp.tanh(x @ params["w"])
        >>> x = jax.random.normal(jax.random.key(0), (50, 4))
        >>> op = mf.FisherOperator(apply, {"w": jnp.ones((4, 3))}, x)
        >>> op
        FisherOperator(P=12, n=50, outputs=3, likelihood='gaussian')
        >>> (op @ jnp.ones(12)).shape, op.to_dense().shape, op.dual.shape
        ((12,), (12, 12), (150, 150))

    Source:
        Martens 2020 (arXiv:1412.1193), sections 5 and 9.
    """

    apply: Callable[..., Any]
    params: Any
    x: Any
    likelihood: str = static(default="gaussian")
    batch_size: int | None = static(default=None)
    output: Any = static(default=None)
    mask: dict[str, Array | np.float32] | None = None
    dense: tuple[str, ...] = static(default=())
    root: Float[Array, "n size size"] | None = None

    def __post_init__(self):
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        object.__setattr__(self, "params", check_params(self.params))
        object.__setattr__(self, "x", check_batch(self.x))
        if callable(self.apply) and jax.tree_util.all_leaves([self.apply]):
            object.__setattr__(self, "apply", Partial(self.apply))
        _ = self.outputs
        if self.batch_size is not None:
            self._check_batch_size(self.batch_size)

    def _check_batch_size(self, batch_size: int) -> None:
        object.__setattr__(self, "batch_size", whole("batch_size", batch_size))
        if batch_size < 1:
            cause, remedy = "must be at least 1", "pass a positive integer, or None"
            raise problem(SpecError, "batch_size", batch_size, cause, remedy)
        if couples_samples(self.replace(batch_size=None)) is not False:
            cause = "the outputs depend on the whole batch (BatchNorm in training)"
            remedy = "leave batch_size out, or measure with statistics='frozen'"
            raise problem(SpecError, "batch_size", batch_size, cause, remedy)

    @classmethod
    def from_linen(
        cls,
        module: Any,
        variables: Any,
        x: Any,
        *,
        statistics: str = "batch",
        likelihood: str = "gaussian",
        batch_size: int | None = None,
        output: Any = None,
        **call: Any,
    ) -> Self:
        """The operator of a Flax Linen module.

        Args:
            module: The module.
            variables: What ``module.init`` or training returned: ``params``, and other collections
                (such as ``batch_stats``), which are held constant.
            x: As for the class; it is passed to the module as :func:`fisher_operator` describes.
            statistics: ``"batch"`` or ``"frozen"``, as in :func:`fisher_operator`. Arguments of the
                module's call named ``train``, ``training``, ``is_training``, ``eval``,
                ``use_running_average`` or ``deterministic`` are set accordingly.
            likelihood: As for the class.
            batch_size: As for the class.
            output: As for the class.
            call: Further keyword arguments of the module's call; they override those above.

        Returns:
            The operator.

        Raises:
            SpecError: if ``variables`` has no ``params``, or if the module would run in a mode
                other than the one requested.

        Example:
            >>> import flax.linen as nn, jax, meanfield_jax as mf
            >>> class Net(nn.Module):
            ...     @nn.compact
            ...     def __call__(self, x, train):
            ...         return nn.Dense(3)(nn.BatchNorm(not train)(nn.Dense(64)(x)))
            >>> x = jax.random.normal(jax.random.key(0), (100, 8))
            >>> variables = Net().init(jax.random.key(1), x, train=True)
            >>> op = mf.FisherOperator.from_linen(Net(), variables, x)
            >>> op.shape  # 64 (8 + 1), 2 64, 3 (64 + 1)
            (899, 899)
        """
        from meanfield_jax.empirical.linen import linen

        check_choice("statistics", statistics, MODES)
        apply, params = linen(module, variables, statistics, call)
        op = cls(apply, params, x, likelihood, batch_size, output)
        remedy = "set the mode with an argument of the call, such as train=..."
        check_mode(op, statistics, apply.running, apply.moved, remedy)
        return op

    @functools.cached_property
    def outputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of all outputs, (n, ..., C).

        Raises:
            SpecError: if a Fisher matrix is not defined for such outputs.
            DataError: if the function cannot be applied to the inputs.
        """
        try:
            # cached: tracing the network costs milliseconds, and a search asks more than once
            found = jax.eval_shape(self.evaluate, self.params, self.x)
        except (SpecError, DataError):
            raise
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            shapes = jax.tree.map(np.shape, self.x)
            cause = f"the model cannot be applied to x ({' '.join(str(error).split())[:200]})"
            raise problem(DataError, "x.shape", shapes, cause, "pass valid inputs") from error
        return found

    def evaluate(
        self, params: Any, x: Any, added: Mapping[str, Array] | None = None
    ) -> Float[Array, "n ..."]:
        """The outputs, in at least float32.

        Products are in full precision unless the model itself requests a precision.

        Args:
            params: Parameters, like ``self.params``.
            x: Inputs, like ``self.x``, with any number of samples.
            added: Arrays to add to the outputs of dense layers, by path; None adds nothing.

        Returns:
            (n, ..., C).
        """
        with precise.by_default():
            if added is None:
                found = self.apply(params, x)
            else:
                assert isinstance(self.apply, Functional)
                found, _ = self.apply.with_added(params, dict(added), x)
        outputs = self._picked(found)
        num_samples = jax.tree.leaves(x)[0].shape[0]
        if outputs.ndim == 0 or outputs.shape[0] != num_samples:
            cause = f"the leading axis must run over the {num_samples} samples"
            remedy = "return outputs (n, ..., C), not a loss or a mean over the batch"
            raise problem(SpecError, "apply(params, x).shape", outputs.shape, cause, remedy)
        if not jnp.issubdtype(outputs.dtype, jnp.floating):
            remedy = "return logits, or the real and imaginary parts"
            argument = "apply(params, x).dtype"
            raise problem(SpecError, argument, str(outputs.dtype), "must be a real float", remedy)
        if self.likelihood == "categorical" and (outputs.ndim < 2 or outputs.shape[-1] < 2):
            cause = f"outputs of shape {outputs.shape} have fewer than two classes"
            remedy = "use likelihood='bernoulli' for a single logit"
            raise problem(SpecError, "likelihood", self.likelihood, cause, remedy)
        return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))

    def _picked(self, found: Any) -> Any:
        """The array that ``output`` selects."""
        if _is_array(found) and self.output is None:
            return found
        names = list(found) if isinstance(found, Mapping) else None
        if names is None and isinstance(found, (tuple, list)):
            names = list(range(len(found)))
        choices = f"set output to one of {', '.join(map(repr, names))}" if names else "leave it out"
        try:
            part = None if self.output is None or names is None else found[self.output]
        except (KeyError, IndexError, TypeError):
            part = None
        if names is None or not _is_array(part):
            kind = f"a {type(found).__name__}" if names else "an array"
            cause = f"apply returns {kind}"
            raise problem(SpecError, "output", self.output, cause, choices)
        return part

    @property
    def num_samples(self) -> int:
        """The number of samples, n."""
        return jax.tree.leaves(self.x)[0].shape[0]

    @property
    def num_parameters(self) -> int:
        """The number of parameters, P."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of all outputs, (n, ..., C)."""
        return self.outputs.shape

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (P, P)."""
        size = self.num_parameters
        return size, size

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the vectors: that of the outputs, at least float32."""
        return self.outputs.dtype

    @property
    def dual(self) -> "FisherDual":
        """The dual (1/n) Lambda^{1/2} J J^T Lambda^{1/2}, with the same non-zero eigenvalues."""
        return FisherDual(self)

    @property
    def paths(self) -> list[str]:
        """Paths of the parameters; any prefix that ends before a "/" is the path of a block."""
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.params)]

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        if set(changes) <= {"mask", "dense"}:
            return self.unchecked(outputs=self.outputs, **changes)
        return dataclasses.replace(self, **changes)

    def unchecked(self, **changes: Any) -> Self:
        """A copy with some fields changed, without checking them."""
        kept = {name: value for name, value in self.__dict__.items() if name != "outputs"}
        copy = object.__new__(type(self))
        copy.__dict__.update(kept | changes)
        return copy

    def block(self, *paths: str) -> Self:
        """The operator of the parameters of some layers or arrays, with all others held constant.

        Args:
            *paths: Paths of the block, such as ``"layers/2"`` or ``"layers/2/kernel"``; see
                :attr:`paths`.

        Returns:
            An operator of the same shape, in which the rows and columns of all other parameters are
            0. All blocks use the same compiled program.

        Raises:
            SpecError: if there are no parameters under a path.
        """
        mask = dict.fromkeys(self.paths, False)
        for path in paths or ("",):
            inside = [name for name in mask if name == path or name.startswith(path + "/")]
            if not inside:
                remedy = f"use one of {', '.join(self.paths)}, or the part before a /"
                raise problem(SpecError, "path", path, "there are no parameters under it", remedy)
            mask |= dict.fromkeys(inside, True)
        return self.replace(mask={name: np.float32(counts) for name, counts in mask.items()})

    def rescaled(self, factors: Mapping[str, Array | float]) -> Self:
        """The operator D F D, where D multiplies every array of parameters by a number.

        With the factors p^(-1/2) it has the eigenvalues of P^(-1) F, the curvature that an
        optimizer sees that divides the updates of each array by p.

        Args:
            factors: By path of an array; those of a block that are left out are 0.

        Returns:
            An operator of the same shape.
        """
        mask = {name: jnp.asarray(factors.get(name, 0.0), self.dtype) for name in self.paths}
        return self.replace(mask=mask)

    def with_loss(self, loss: Callable[[Any, Any], Any], y: Any) -> Self:
        """The generalized Gauss-Newton matrix of any convex loss, (1/n) sum_i J_i^T H_i J_i.

        H_i is the Hessian of the loss of sample i in its outputs, at the present outputs. For the
        losses of the likelihoods this is F itself.

        Args:
            loss: A twice differentiable function of the outputs (n, ..., C) and ``y``, which
                returns a loss for each sample, (n,), or their mean, ().
            y: Targets, as the loss takes them.

        Returns:
            An operator of the same shape. Its H_i belong to the present parameters and inputs.

        Raises:
            SpecError: if the loss cannot be used, or is not convex at these outputs.

        Example:
            >>> import jax.numpy as jnp, meanfield_jax as mf, optax
            >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[2.5], [9.0]])
            >>> op = mf.FisherOperator(lambda w, x: x @ w, jnp.ones((2, 1)), x)
            >>> def huber(outputs, y):
            ...     return optax.huber_loss(outputs, y, delta=1.0).sum(-1)
            >>> op.with_loss(huber, y).to_dense()  # the second sample has |f - y| > 1
            Array([[0.5, 1. ],
                   [1. , 2. ]], dtype=float32)
        """
        root = square_root(curvature(loss, _outputs(self), y))
        return self.unchecked(outputs=self.outputs, root=root, likelihood="gaussian")

    def change(self, vector: Array) -> Array:
        """The change J v of the outputs, (n, ..., C), along a vector of parameters, (P,)."""
        return jacobian(self).forward(self._tree(vector))

    def linearize(self) -> Product:
        """Evaluates the network once and returns the product v -> F v, from (P,) to (P,)."""
        product = self._product()
        return lambda vector: self.flat(product(self._tree(vector)))

    def parameter_product(self, vector: Any) -> Any:
        """The product F v for a pytree like ``params``, as ``op @ vector`` computes it."""
        return self._product()(vector)

    def __matmul__(self, vector: Any) -> Any:
        """The product F v.

        Args:
            vector: An array (P,), an array (P, k) for k products at once, or a pytree like
                ``params``.

        Returns:
            An array of the same shape, or a pytree like ``params``.
        """
        if _is_array(vector) and not (
            _is_array(self.params) and vector.shape == self.params.shape != self.shape[:1]
        ):
            return super().__matmul__(vector)
        check_tree("vector", vector, is_layer)
        if jax.tree.structure(vector) != jax.tree.structure(self.params):
            remedy = f"pass an array ({self.num_parameters},) or a pytree like params"
            cause = "its structure differs from that of params"
            raise problem(SpecError, "vector", type(vector).__name__, cause, remedy)
        vector = jax.tree.map(lambda leaf: array("vector", leaf), vector)
        return _parameter_product(self, vector)

    def _product(self) -> Callable[[Any], Any]:
        outputs, forward, backward = jacobian(self)
        factor, transposed = likelihood_factor(self.likelihood, outputs, self.root)

        def product(vector: Any) -> Any:
            vector = jax.tree.map(
                lambda part, leaf: jnp.asarray(part, leaf.dtype), vector, self.params
            )
            found = backward(factor(transposed(forward(vector))))
            return jax.tree.map(lambda leaf: leaf / self.num_samples, found)

        return product

    def flat(self, tree: Any) -> Float[Array, " P"]:
        """A pytree like ``params`` as one vector, in the order of its leaves."""
        leaves = [jnp.ravel(leaf).astype(self.dtype) for leaf in jax.tree.leaves(tree)]
        return jnp.concatenate(leaves)

    def _tree(self, vector: Float[Array, " P"]) -> Any:
        """The inverse of ``_flat``."""
        leaves, treedef = jax.tree.flatten(self.params)
        ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])[:-1]
        parts = jnp.split(vector, ends)
        return treedef.unflatten(
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        )

    def __repr__(self) -> str:
        if not all(_is_array(leaf) for leaf in jax.tree.leaves((self.params, self.x))):
            return f"{type(self).__name__}(...)"
        per_sample = "x".join(map(str, self.output_shape[1:])) or "1"
        parts = [f"P={self.num_parameters}", f"n={self.num_samples}", f"outputs={per_sample}"]
        parts.append(f"likelihood={self.likelihood!r}" if self.root is None else "with_loss")
        if self.batch_size is not None:
            parts.append(f"batch_size={self.batch_size}")
        if self.mask is not None:
            parts.append("block")
        return f"{type(self).__name__}({', '.join(parts)})"


@pytree(eq=False, repr=False)
class FisherDual(SymmetricOperator):
    """The dual of a Fisher matrix acts on all outputs of a batch; see :attr:`FisherOperator.dual`.

    Attributes:
        fisher: The operator whose dual this is.
    """

    fisher: FisherOperator

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (n C, n C), where C counts all outputs of a sample."""
        size = math.prod(self.fisher.output_shape)
        return size, size

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the vectors: that of the Fisher operator."""
        return self.fisher.dtype

    def linearize(self) -> Product:
        """Evaluates the network once and returns the product u -> A u, from (n C,) to (n C,)."""
        op = self.fisher
        outputs, product = outer(op)
        factor, transposed = likelihood_factor(op.likelihood, outputs, op.root)

        def dual(u: Array) -> Array:
            moved = transposed(product(factor(u.reshape(outputs.shape))))
            return moved.reshape(-1) / op.num_samples

        return dual

    def to_parameters(self, vectors: Float[Array, "k size"]) -> Float[Array, "k P"]:
        """Eigenvectors of F from those of the dual: J^T Lambda^{1/2} u, normalized.

        Args:
            vectors: Eigenvectors of the dual, (k, n C).

        Returns:
            Eigenvectors of F, (k, P); NaN where the eigenvalue is 0.
        """
        return _to_parameters(self, vectors)

    def __repr__(self) -> str:
        return f"{self.fisher!r}.dual"


@jax.jit
def _outputs(op: FisherOperator) -> Float[Array, "n ..."]:
    return jacobian(op).outputs


@jax.jit
def _parameter_product(op: FisherOperator, vector: Any) -> Any:
    return op.parameter_product(vector)


@jax.jit
def _to_parameters(dual: FisherDual, vectors: Float[Array, "k size"]) -> Float[Array, "k P"]:
    op = dual.fisher
    outputs, _, backward = jacobian(op)
    factor, _ = likelihood_factor(op.likelihood, outputs, op.root)

    def one(u: Array) -> Array:
        gradient = op.flat(backward(factor(u.reshape(outputs.shape))))
        return gradient / jnp.linalg.norm(gradient)

    return jax.lax.map(one, vectors)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, np.generic, jax.Array))
