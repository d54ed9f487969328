"""What ``--json`` prints: the results of each command, and the JSON Schema made from this list.

A result is a data set: variables with named dimensions and nested lists of values. A number that is
not finite is null, because JSON has neither NaN nor Infinity.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

FORMAT = "meanfield_jax.result/2"
"""Name and version of the form; the version changes when something is renamed or removed."""

NUMBER, WHOLE, TRUTH, TEXT, OBJECT = "number", "integer", "boolean", "string", "object"
ANY = None
"""Dimensions that depend on the options."""


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of a result.

    Attributes:
        dims: Its dimensions, separated by blanks; ``ANY`` if they depend on the options.
        meaning: What it is.
        kind: Type of a value.
        optional: Whether it is missing with some options.
    """

    dims: str | None
    meaning: str
    kind: str = NUMBER
    optional: bool = False

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the variable."""
        one = [self.kind, "null"] if self.kind == NUMBER else self.kind
        values: dict[str, Any] = dict(type=one)
        dims: dict[str, Any] = dict(type="array", items=dict(type=TEXT))
        if self.dims is None:
            values = {"$ref": f"#/$defs/nested_{self.kind}"}
        else:
            names = self.dims.split()
            dims = dict(const=names)
            for _ in names:
                values = dict(type="array", items=values)
        return _closed(dict(dims=dims, values=values)) | dict(description=self.meaning)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        network: What network it has, if any.
        attributes: Type of each attribute.
        variables: The variables by name.
    """

    network: str | None
    attributes: dict[str, str]
    variables: dict[str, Variable]

    def schema(self, command: str) -> dict[str, Any]:
        """The JSON Schema of the whole result."""
        parts: dict[str, Any] = dict(
            format=dict(const=FORMAT),
            command=dict(const=command),
            attributes=_closed({k: _attribute(kind) for k, kind in self.attributes.items()}),
            variables=_closed(
                {name: variable.schema() for name, variable in self.variables.items()},
                [name for name, variable in self.variables.items() if not variable.optional],
            ),
        )
        if self.network is not None:
            spec = dict(format=dict(const="meanfield_jax.Network/1"))
            parts["network"] = dict(
                type="object",
                description=f"{self.network}, as Network.to_json writes it and --spec reads it",
                properties=spec,
                required=["format", "input_shape", "layers"],
            )
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"meanfield-jax {command} --json",
            "description": "null stands for a number that is not finite",
            **_closed(parts),
            "$defs": {
                f"nested_{kind}": _nested(kind)
                for kind in (NUMBER, WHOLE)
                if any(v.dims is ANY and v.kind == kind for v in self.variables.values())
            },
        }


def _closed(properties: dict[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    """An object with these properties and no others."""
    names = list(properties) if required is None else list(required)
    return dict(type="object", properties=properties, required=names, additionalProperties=False)


def _attribute(kind: str) -> dict[str, Any]:
    return dict(type=[kind, "null"] if kind == NUMBER else kind)


def _nested(kind: str) -> dict[str, Any]:
    one = dict(type=[kind, "null"] if kind == NUMBER else kind)
    return dict(anyOf=[one, dict(type="array", items={"$ref": f"#/$defs/nested_{kind}"})])


def _over(dims: str, optional: bool = False, **meanings: str) -> dict[str, Variable]:
    """Several variables of numbers with the same dimensions."""
    return {name: Variable(dims, said, optional=optional) for name, said in meanings.items()}


_ANALYZE = Result(
    "the network",
    dict(status=TEXT, domain=TEXT, statistics=TEXT, momentum=NUMBER),
    dict(
        layer=Variable("layer", "path of a Dense or Conv layer", TEXT),
        block=Variable("block", "path of a layer with parameters", TEXT),
        **_over(
            "layer",
            q="second moment of a pre-activation",
            q_xy="second moment of pre-activations for two inputs",
            q_hat="second moment of a value entering the layer",
            q_hat_xy="second moment of values entering the layer for two inputs",
            q_tilde="second moment of the outputs' gradient",
            q_tilde_xy="second moment of the outputs' gradients for two inputs",
        ),
        **_over(
            "block",
            contribution_weights="what the weights contribute to the outlier",
            contribution_biases="what the biases contribute to the outlier",
            contribution_norm="what scale and offset of a norm contribute to the outlier",
        ),
        **_over(
            "",
            tangent_same="tangent kernel of one input with itself",
            tangent_other="tangent kernel of two inputs",
            outlier="large eigenvalues of F, mean over draws",
            bulk="the other eigenvalues of F",
            trace="trace of F",
            mean="mean eigenvalue of F",
            second_moment="mean squared eigenvalue of F",
            outlier_low="smallest outlier of one draw",
            outlier_high="largest outlier of one draw",
            bulk_high="upper edge of the bulk",
            lambda_max="largest eigenvalue of F of one draw",
            eta_max="largest stable learning rate",
        ),
        within_domain=Variable("", "whether lambda_max can be trusted", TRUTH),
        **_over(
            "bound",
            optional=True,
            lambda_max_interval="with --draws: bounds for lambda_max of nine draws in ten",
        ),
        **_over("draw", optional=True, lambda_max_drawn="with --draws: lambda_max of each draw"),
    ),
)

_VALIDATE = Result(
    "the network",
    dict(num_samples=WHOLE, momentum=NUMBER, data=TEXT),
    dict(
        network=Variable("network", "label: vanilla, or the scale of the norms", TEXT),
        gamma=Variable("network", "scale of the norms; null without norms"),
        statistics=Variable("statistics", "what the theory assumes", TEXT),
        mode=Variable("mode", "what was measured: training or evaluation mode", TEXT),
        **_over(
            "network statistics",
            predicted="mean of the outliers of F, predicted",
            ratio="predicted / measured_mean",
            lambda_max="largest eigenvalue of F of one draw, predicted, as by analyze",
            eta_max="largest stable learning rate, from lambda_max, as by analyze",
        ),
        measured=Variable("network mode draw outlier", "largest eigenvalues, measured"),
        **_over(
            "network mode",
            measured_mean="mean of the measured outliers",
            standard_error="its standard error over draws; null for one draw",
            lambda_max_measured="largest measured eigenvalue, median over draws",
            eta_max_measured="largest stable learning rate, from lambda_max_measured",
        ),
        **_over("curve_gamma", optional=True, curve_gamma="scales of the curve"),
        **_over(
            "curve_gamma statistics",
            optional=True,
            curve="mean of the outliers, predicted on the curve",
            curve_lambda_max="lambda_max on the curve",
        ),
        eigenvalue=Variable("eigenvalue", "rank of an eigenvalue", WHOLE, optional=True),
        **_over(
            "network mode eigenvalue",
            optional=True,
            spectrum_predicted="eigenvalues of the kernel, by the theory for the inputs",
            spectrum_error="standard error of the measured ones",
            spectrum_ratio="predicted / measured",
        ),
        spectrum_measured=Variable(
            "network mode draw eigenvalue", "eigenvalues of the kernel, measured", optional=True
        ),
        **_over(
            "network mode",
            optional=True,
            trace_predicted="trace of F, predicted",
            trace_ratio="predicted / measured",
        ),
        trace_measured=Variable("network mode draw", "trace of F, measured", optional=True),
        num_steps=Variable("", "steps of a training", WHOLE, optional=True),
        event=Variable("event", "what a training is followed until", TEXT, optional=True),
        **_over(
            "network event",
            optional=True,
            rate_predicted="largest learning rate from a random start, predicted",
            rate_ratio="predicted / median of the measured",
        ),
        rate_measured=Variable(
            "network event draw",
            "largest learning rate without the event, measured; null where none was found",
            optional=True,
        ),
        rate_domain=Variable(
            "network", "why the predicted rates may be wrong", TEXT, optional=True
        ),
    ),
)

_SPECTRUM = Result(
    "the network",
    dict(statistics=TEXT, outlier_low=NUMBER, outlier_high=NUMBER),
    dict(
        predicted=Variable("predicted_rank", "all eigenvalues of F, predicted, descending"),
        eigenvalues=Variable("rank", "largest eigenvalues of F, measured, descending"),
        error_bounds=Variable("rank", "bounds of their errors"),
        nodes=Variable("draw step", "nodes of the spectral density"),
        weights=Variable("draw step", "weights of the nodes, which sum to 1"),
    ),
)

_COMPARE = Result(
    "the network, before its norms are exchanged",
    dict(momentum=NUMBER, epochs=WHOLE, num_samples=WHOLE, loss=TEXT, data=TEXT),
    dict(
        norm=Variable("norm", "name of the norm", TEXT),
        batch_size=Variable("batch_size", "samples per batch", WHOLE),
        learning_rate=Variable("learning_rate", "learning rate"),
        seed=Variable("seed", "training run", WHOLE),
        draw=Variable("draw", "measured network", WHOLE),
        **_over(
            "norm batch_size",
            predicted="lambda_max, predicted; null where the theory needs more samples",
            standard_error="standard error of measured over draws",
            ratio="predicted / measured",
            eta_max="largest stable learning rate, predicted",
            eta_max_measured="largest stable learning rate, measured",
            best_rate="learning rate of the smallest training loss; null if all diverged",
            best_loss="training loss at that rate",
            best_test_loss="test loss at that rate",
            best_test_accuracy="test accuracy at that rate",
        ),
        within_domain=Variable("norm batch_size", "whether predicted can be trusted", TRUTH),
        measured=Variable("norm batch_size draw", "lambda_max, measured"),
        **_over(
            "norm batch_size learning_rate seed",
            loss="training loss after the last epoch; null where it diverged",
            test_loss="test loss",
            test_accuracy="test accuracy",
        ),
    ),
)

_SWEEP = Result(
    "the network, before the numbers of the grid are put in",
    dict(specification=OBJECT, versions=OBJECT, devices=TEXT, finished=TEXT),
    dict(
        batch_size=Variable(ANY, "samples per step", WHOLE),
        depth=Variable(ANY, "hidden blocks", WHOLE, optional=True),
        width=Variable(ANY, "units or channels of every hidden layer", WHOLE, optional=True),
        gamma=Variable(ANY, "initial scale of every norm", optional=True),
        weight_var=Variable(ANY, "variance of a weight times the fan-in", optional=True),
        learning_rate=Variable(ANY, "learning rate"),
        momentum=Variable(ANY, "momentum of the heavy ball"),
        seed=Variable(ANY, "seed of the draw and of the order of the samples", WHOLE),
        epoch=Variable("epoch", "number of the epoch", WHOLE),
        loss=Variable(ANY, "training loss after each epoch; null from divergence on"),
        test_loss=Variable(ANY, "test loss after each epoch", optional=True),
        test_accuracy=Variable(ANY, "test accuracy after each epoch", optional=True),
        diverged_at=Variable(
            ANY, "step at which training diverged; -1: it did not; -2: not computed", WHOLE
        ),
        status=Variable(ANY, "how the run ended, a number of mf.Status", WHOLE),
        eta_max_batch=Variable(ANY, "predicted boundary, training mode"),
        eta_max_frozen=Variable(ANY, "predicted boundary, evaluation mode"),
        eta_max_wei2019=Variable(ANY, "predicted boundary, as published"),
    ),
)

RESULTS = {
    "analyze": _ANALYZE,
    "phase": Result(
        None,
        dict(block=TEXT, units=TEXT, status=TEXT, statistics=TEXT, num_samples=NUMBER),
        dict(
            weight_var=Variable("weight_var", "variance of the weights"),
            bias_var=Variable("bias_var", "variance of the biases"),
            **_over(
                "weight_var bias_var",
                q="second moment of a pre-activation q*",
                c="correlation of two inputs c*",
                chi_q="slope of the map of q",
                chi_c="slope of the map of correlations at c*",
                chi_1="slope of the map of correlations at c = 1",
                growth="growth of squared gradients per block",
                xi_q="depth scale of q",
                xi_c="depth scale of correlations",
                xi_gradient="depth scale of squared gradients",
            ),
            status=Variable("weight_var bias_var", "how the search ended", WHOLE),
            critical_weight_var=Variable("bias_var", "weight_var at which chi_1 = 1"),
        ),
    ),
    "validate": _VALIDATE,
    "spectrum": _SPECTRUM,
    "compare": _COMPARE,
    "sweep": _SWEEP,
    "check": Result(
        None,
        dict(store=TEXT, whole=WHOLE, damaged=WHOLE, missing=WHOLE, unknown=WHOLE),
        dict(
            file=Variable("fault", "file, by its path in the store", TEXT),
            state=Variable("fault", "repairable or lost", TEXT),
            remedy=Variable("fault", "what to do", TEXT),
        ),
    ),
    "plot": _SWEEP,
    "tune": Result(
        "the tuned network",
        dict(status=TEXT, message=TEXT),
        dict(
            step=Variable("step", "step of the descent", WHOLE),
            layer=Variable("layer", "path of a layer with tuned numbers", TEXT),
            **_over(
                "step",
                objective="the objective",
                lambda_max="largest eigenvalue of F",
                eta_max="largest stable learning rate",
            ),
            **_over(
                "step layer",
                optional=True,
                gamma="scale of a norm; null where the layer has none",
                beta="offset of a norm",
                weight_var="variance of a weight times the fan-in",
                bias_var="variance of a bias",
            ),
        ),
    ),
}
"""The results by command."""


def print_json(command: str, dataset: xr.Dataset) -> None:
    """Prints a result, with the data set's attribute "network" or "spec" as its network."""
    attributes = dict(dataset.attrs)
    network = attributes.pop("network", None) or attributes.pop("spec", None)
    _print(command, dataset, attributes, network and json.loads(network))


def print_sweep(command: str, dataset: xr.Dataset) -> None:
    """Prints the result of a sweep, whose specification has the network in it."""
    attributes = dict(dataset.attrs)
    attributes["versions"] = json.loads(attributes["versions"])
    attributes["specification"] = json.loads(attributes.pop("spec"))
    _print(command, dataset, attributes, attributes["specification"].pop("network"))


def _print(command: str, dataset: xr.Dataset, attributes: dict[str, Any], network: Any) -> None:
    variables = {
        str(name): dict(dims=list(array.dims), values=_plain(array.values.tolist()))
        for name, array in dataset.variables.items()
    }
    parts: dict[str, Any] = dict(format=FORMAT, command=command)
    if network is not None:
        parts["network"] = network
    parts |= dict(attributes=_plain(attributes), variables=variables)
    print(json.dumps(parts, indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """The value with numbers of Python, and None for those that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
