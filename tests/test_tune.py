"""Tuning: objectives and their derivatives, closed forms, every way a descent can end."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from draws import UNFUSED
from json_results import parsed
from sklearn.datasets import load_digits
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.cli import main

objectives = mf.objectives


def network(hidden=2, activation="relu", norm=True, **options):
    """Of the command's inputs and outputs: what it tunes is compiled once with what tests tune."""
    norm = mf.BatchNorm(**options) if norm else None
    return mf.mlp([300] * hidden, inputs=784, outputs=10, activation=activation, norm=norm)


def repeated(activation, times, **options):
    """Blocks that are compiled as one."""
    block = mf.Sequential((mf.Dense(300), mf.BatchNorm(**options), mf.Activation(activation)))
    return mf.Network((300,), (mf.Repeat(block, times), mf.Dense(10)))


def lowest(theory):
    """An objective of a user's own: lambda_max is to be 20."""
    return jnp.log(theory.fisher.lambda_max / 20) ** 2


def distance(theory, target, sign):
    return jnp.abs(jnp.log(sign * theory.eta_max()) - target)


def growing(target=1.5, sign=1.0):
    """One with a kink where log(eta_max) is the target; by default that is never reached."""
    return objectives.Objective(distance, dict(target=target, sign=sign))


OBJECTIVES = {
    "target_eta_max": objectives.target_eta_max(0.1),
    "max_eta_max, floor met": objectives.max_eta_max(0.1),
    "max_eta_max, floor missed": objectives.max_eta_max(10.0),
    "sharpness": objectives.sharpness(1.0),
    "equal_shares": objectives.equal_shares(),
    "unit_growth": objectives.unit_growth(),
    "target_rate, no_spike": objectives.target_rate(0.1),
    "target_rate, bounded": objectives.target_rate(0.1, "bounded", momentum=0.5),
    "target_rate, quadratic": objectives.target_rate(0.1, "quadratic"),
    "max_rate": objectives.max_rate(0.1),
}


def with_jacobian(values):
    """The function and its derivatives, in reverse mode as in a descent."""
    return (
        jax.jit(function, compiler_options=UNFUSED) for function in (values, jax.jacrev(values))
    )


def differences(function, at, step=1e-5):
    """Central ones of fourth order, (..., numbers): what holds a scale has large derivatives."""
    units = step * np.eye(len(at))
    near = [np.asarray(function(at + unit)) - function(at - unit) for unit in units]
    far = [np.asarray(function(at + 2 * unit)) - function(at - 2 * unit) for unit in units]
    return (8 * np.stack(near, -1) - np.stack(far, -1)) / (12 * step)


@pytest.mark.slow
def test_derivatives_are_those_of_differences(x64):
    def values(numbers):
        gamma, beta, weight_var = numbers
        norm = mf.BatchNorm(gamma=gamma, beta=beta)
        numbers = dict(norm=norm, weight_var=weight_var)
        net = mf.mlp([300], inputs=50, outputs=10, activation="tanh", **numbers)
        # where the weights before a norm have a share, too
        theory = mf.analyze(net, statistics="frozen", num_samples=40)
        return jnp.stack([objective(theory) for objective in OBJECTIVES.values()])

    values, slopes = with_jacobian(values)
    for at in ([0.7, 0.4, 1.3], [1.2, 0.0, 2.0]):
        at = np.array(at)
        slope = np.asarray(slopes(at))
        scale = np.maximum(np.abs(slope).max(1), np.maximum(1, np.abs(values(at))))
        assert_close(slope, differences(values, at), "difference", scale=scale[:, None])


@pytest.mark.slow
def test_derivatives_on_data_are_those_of_differences(x64):
    on_data = [OBJECTIVES[name] for name in ("target_eta_max", "equal_shares", "sharpness")]
    x = np.random.default_rng(0).standard_normal((12, 50)) + 0.5

    def values(weight_vars):
        relu = mf.Activation("relu")
        hidden = [part for var in weight_vars[:-1] for part in (mf.Dense(300, var), relu)]
        net = mf.Network((50,), (*hidden, mf.Dense(10, weight_vars[-1])))
        theory = mf.analyze(net, data=x)
        return jnp.stack([objective(theory) for objective in on_data])

    values, slopes = with_jacobian(values)
    at = np.array([1.5, 2.0, 0.7])
    slope = np.asarray(slopes(at))
    scale = np.maximum(np.abs(slope).max(1), np.maximum(1, np.abs(values(at))))
    assert_close(slope, differences(values, at), "difference", scale=scale[:, None])


RATES = ("quadratic", "no_spike", "bounded")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", [mf.BatchNorm(0.7), mf.LayerNorm(), None], ids=repr)
def test_objectives_speak_of_the_rates_of_learning_rate(norm, momentum, x64):
    """For i.i.d. inputs, also infinitely many, and on data."""
    net = mf.mlp([100] * 2, inputs=20, outputs=10, norm=norm)
    x = np.random.default_rng(0).standard_normal((30, 20))
    for given in (dict(), dict(num_samples=30), dict(data=x)):
        theory, data = mf.analyze(net, **given), given.get("data")
        options = dict(num_samples=given.get("num_samples"), momentum=momentum)
        expected = mf.learning_rate(net, data, **options)
        for rate in RATES:
            objective = objectives.target_rate(1.0, rate, momentum=momentum)
            value = np.log(float(getattr(expected, rate))) ** 2
            assert_close(objective(theory, data), value, "rounding")


@pytest.mark.slow
@pytest.mark.parametrize("on_data", [False, True])
def test_derivatives_of_rates_in_training_mode_are_those_of_differences(on_data, x64):
    chosen = [objectives.target_rate(0.1, rate) for rate in RATES] + [objectives.max_rate(0.3)]
    x = np.random.default_rng(0).standard_normal((12, 50)) + 0.5 if on_data else None

    def values(numbers):
        gamma, other, weight_var = numbers
        hidden = [
            part
            for scale in (gamma, other)
            for part in (mf.Dense(300), mf.BatchNorm(scale), mf.Activation("relu"))
        ]
        net = mf.Network((50,), (*hidden, mf.Dense(10, weight_var)))
        theory = mf.analyze(net, data=x, num_samples=None if on_data else 40)
        return jnp.stack([objective(theory, x) for objective in chosen])

    values, slopes = with_jacobian(values)
    at = np.array([0.7, 1.3, 0.8])
    slope = np.asarray(slopes(at))
    scale = np.maximum(np.abs(slope).max(1), np.maximum(1, np.abs(values(at))))
    # averages over a normalized batch are integrals
    kind = "quadrature_edge" if on_data else "difference"
    assert_close(slope, differences(values, at), kind, scale=scale[:, None])
    # the last scale decides all rates
    assert np.all(np.abs(slope[:, 1]) > 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
def test_each_rate_reaches_its_target(rate, x64):
    tuned = mf.tune(network(), objectives.target_rate(0.3, rate), shared=True)
    assert tuned.status == mf.Status.CONVERGED
    found = mf.learning_rate(tuned.network)
    assert float(getattr(found, rate)) == pytest.approx(0.3, rel=5e-6)
    other = mf.learning_rate(network())
    assert float(getattr(other, rate)) != pytest.approx(0.3, rel=0.1)


@pytest.mark.slow
def test_a_rate_reaches_its_target_on_data(x64):
    x = load_digits().data[:60] / 16
    net = mf.mlp([200], inputs=64, outputs=10, norm=mf.BatchNorm())
    tuned = mf.tune(net, objectives.target_rate(0.3, "bounded"), data=x)
    assert tuned.status == mf.Status.CONVERGED
    assert float(mf.learning_rate(tuned.network, x).bounded) == pytest.approx(0.3, rel=5e-6)


@pytest.mark.slow
def test_the_largest_rate_without_a_spike_sits_on_the_floor_of_the_outputs(x64):
    """With one scale, which the floor alone determines; more numbers raise the rate."""
    one = mf.tune(network(1), objectives.max_rate(0.1))
    two = mf.tune(network(1), objectives.max_rate(0.1), over=("gamma", "weight_var"))
    for tuned in (one, two):
        assert tuned.status == mf.Status.CONVERGED
        above = float(objectives.output_variance(tuned.after)) / 0.1
        assert 1 < above < 1 + 3 * objectives.MARGIN
    alone, freer = (float(mf.learning_rate(t.network).no_spike) for t in (one, two))
    assert freer > 1.2 * alone


@pytest.mark.slow
def test_shared_gamma_for_a_learning_rate_is_the_root_of_the_theory(x64):
    net = network()
    tuned = mf.tune(net, objectives.target_eta_max(0.1, momentum=0.5), shared=True)
    assert tuned.status == mf.Status.CONVERGED

    def excess(gamma):
        at = network(gamma=gamma)
        return float(mf.analyze(at).eta_max(0.5)) - 0.1

    gamma = scipy.optimize.brentq(excess, 0.1, 3, xtol=1e-14)
    # the derivative of log(eta / target)^2, 1e-5, is twice how far from the target it may end
    values = [layer.gamma for layer in tuned.network.layers if isinstance(layer, mf.BatchNorm)]
    assert values == pytest.approx([gamma] * 2, rel=5e-6)
    assert float(tuned.after.eta_max(0.5)) == pytest.approx(0.1, rel=5e-6)
    # before the last layer nothing counts but eps
    per_layer = mf.tune(net, objectives.target_eta_max(0.1, momentum=0.5))
    assert float(per_layer.after.eta_max(0.5)) == pytest.approx(0.1, rel=5e-6)
    assert per_layer.network.layers[4].gamma == pytest.approx(gamma, rel=1e-3)


@pytest.mark.slow
def test_single_precision_reaches_the_target_too():
    tuned = mf.tune(network(1), objectives.target_eta_max(0.1))
    assert tuned.status == mf.Status.CONVERGED
    assert float(tuned.after.eta_max()) == pytest.approx(0.1, rel=2e-4)


@pytest.mark.slow
def test_the_history_is_that_of_the_descent(x64):
    tuned = mf.tune(network(1), lowest, over=("gamma", "weight_var"), momentum=0.5)
    history = tuned.history
    assert tuned.status == mf.Status.CONVERGED
    assert history.attrs == {}
    assert history.objective.long_name == "lowest"
    assert (np.diff(history.objective) <= 0).all()
    assert_close(history.eta_max, 3 / history.lambda_max, "rounding")
    ends = history.isel(step=[0, -1]).lambda_max
    assert_close(ends, [t.fisher.lambda_max for t in (tuned.before, tuned.after)], "rounding")
    assert list(history.layer.values) == [f"layers/{index}" for index in (0, 1, 3)]
    assert np.isnan(history.gamma.sel(layer="layers/0")).all()
    last = history.isel(step=-1)
    assert float(last.gamma.sel(layer="layers/1")) == tuned.network.layers[1].gamma
    assert float(last.weight_var.sel(layer="layers/3")) == tuned.network.layers[3].weight_var
    assert "Tuning of lowest: converged" in repr(tuned)
    assert "layers/1  gamma 1 ->" in repr(tuned)


@pytest.mark.slow
def test_any_optimizer_of_optax_descends(x64):
    for optimizer in (optax.adam(0.05), optax.lbfgs()):
        tuned = mf.tune(network(1), lowest, optimizer=optimizer, max_steps=400, tolerance=1e-4)
        assert tuned.status == mf.Status.CONVERGED
        assert float(tuned.after.fisher.lambda_max) == pytest.approx(20, rel=1e-3)


@pytest.mark.slow
def test_equal_shares_are_reached(x64):
    tuned = mf.tune(network(norm=False), objectives.equal_shares(), over="weight_var")
    assert tuned.status == mf.Status.CONVERGED
    shares = tuned.after.fisher.contributions.weights
    # the weights of the first layer see uncorrelated inputs
    assert float(shares[0]) == 0
    assert np.asarray(shares[1:]) == pytest.approx(float(shares[1]), rel=1e-4)
    assert float(tuned.history.objective[-1]) == pytest.approx(1 / (len(shares) - 1))


@pytest.mark.slow
def test_the_batch_itself_can_be_tuned_for(x64):
    x = load_digits().data[:60] / 16
    net = mf.mlp([200], inputs=64, outputs=10)
    target = objectives.target_eta_max(0.05)
    tuned = mf.tune(net, target, over="weight_var", data=x, shared=True)
    assert tuned.status == mf.Status.CONVERGED
    assert float(mf.analyze(tuned.network, data=x).eta_max()) == pytest.approx(0.05, rel=5e-6)
    assert tuned.after.fisher.eigenvalues.shape == (60,)


def test_a_rectifier_needs_beta_for_unit_growth(x64):
    tuned = mf.tune(network(), objectives.unit_growth())
    assert tuned.status == mf.Status.INDEPENDENT
    assert "tune beta as well: over=('gamma', 'beta')" in tuned.message
    growth = np.asarray(objectives.growth(tuned.before))
    # BatchNorm's eps takes away 1e-5 of the variance
    assert growth == pytest.approx(np.pi / (np.pi - 1), rel=1e-4)
    with pytest.raises(RuntimeError, match="does not depend on gamma"):
        tuned.raise_if_failed()


@pytest.mark.slow
def test_beta_brings_a_rectifiers_growth_to_one(x64):
    net, over = repeated("relu", 3), ("gamma", "beta")
    tuned = mf.tune(net, objectives.unit_growth(), over=over, shared=True)
    assert tuned.raise_if_failed() is tuned
    assert np.asarray(objectives.growth(tuned.after)) == pytest.approx(1, abs=1e-3)
    norm = tuned.network.layers[0].block.layers[1]
    assert norm.beta > 2.5 * norm.gamma


@pytest.mark.parametrize("ratio", [-1.0, 0.0, 0.3, 2.0])
def test_growth_of_a_shifted_rectifier_is_the_integral(ratio, x64):
    """Growth gamma^2 E[phi'^2] / Var(phi), phi = max(gamma x + beta, 0), in closed form."""
    gamma = 0.8
    normal = scipy.stats.norm
    first = normal.pdf(ratio) + ratio * normal.cdf(ratio)
    second = (1 + ratio**2) * normal.cdf(ratio) + ratio * normal.pdf(ratio)
    expected = normal.cdf(ratio) / (second - first**2)
    net = repeated("relu", 3, gamma=gamma, beta=ratio * gamma, eps=0.0)
    assert_close(objectives.growth(mf.analyze(net)), expected, "quadrature")


@pytest.mark.slow
def test_thirty_layers_of_tanh_become_linear(x64):
    tuned = mf.tune(repeated("tanh", 30), objectives.unit_growth())
    before, after = (np.asarray(objectives.growth(t)) for t in (tuned.before, tuned.after))
    assert before[1:] == pytest.approx(1.17781, rel=1e-4)
    assert tuned.status == mf.Status.CONVERGED
    assert after == pytest.approx(1, abs=1e-3)
    (gamma,) = tuned.history.gamma.isel(step=-1).values
    assert 0 < gamma < 0.3
    assert tuned.history.layer.item() == "layers/0/block/layers/1"


@pytest.mark.parametrize("floor", [0.1, 10.0])
def test_the_largest_rate_sits_on_the_floor_of_the_outputs(floor, x64):
    tuned = mf.tune(network(1), objectives.max_eta_max(floor))
    assert tuned.status == mf.Status.CONVERGED
    above = float(objectives.output_variance(tuned.after)) / floor
    assert 1 < above < 1 + 3 * objectives.MARGIN
    # the scale before the last layer decides: V = w gamma^2 (1 - 1/pi) / 2
    gamma = np.sqrt(floor * above / (1 - 1 / np.pi))
    assert tuned.network.layers[1].gamma == pytest.approx(gamma, rel=1e-4)


@pytest.mark.slow
def test_sharpness_falls_at_the_scale_of_the_outputs(x64):
    net = network(activation="erf", gamma=0.5)
    tuned = mf.tune(net, objectives.sharpness(0.5), bounds=dict(gamma=(0.1, 4)))
    assert tuned.status == mf.Status.CONVERGED
    assert float(objectives.output_variance(tuned.after)) == pytest.approx(0.5, rel=5e-3)
    # sharper at the same scale of the outputs, which the last gamma decides: with it for all
    shared = mf.analyze(network(activation="erf", gamma=tuned.network.layers[4].gamma))
    variances = [float(objectives.output_variance(t)) for t in (tuned.after, shared)]
    assert variances[0] == pytest.approx(variances[1], rel=1e-3)
    ratio = [float(t.fisher.lambda_max / t.fisher.mean) for t in (tuned.after, shared)]
    assert ratio[0] < ratio[1]


def test_a_descent_without_end_is_said_to_run_away(x64):
    tuned = mf.tune(network(1), growing())
    assert tuned.status == mf.Status.DIVERGED
    assert "it has no minimum nearby" in tuned.message
    assert "objectives.max_eta_max" in tuned.message


def test_bounds_hold(x64):
    tuned = mf.tune(network(1), growing(), bounds=dict(gamma=(0.3, 3)))
    assert tuned.status == mf.Status.CONVERGED
    assert tuned.network.layers[1].gamma == pytest.approx(0.3, rel=1e-5)
    assert float(tuned.history.gamma.min()) >= 0.3


@pytest.mark.slow
def test_too_few_steps_and_nothing_finite_are_told(x64):
    tuned = mf.tune(network(), objectives.target_eta_max(0.1), max_steps=2)
    assert tuned.status == mf.Status.MAX_STEPS
    assert "raise max_steps" in tuned.message
    assert tuned.history.sizes["step"] == 2
    tuned = mf.tune(network(1), growing(sign=-1.0))
    assert tuned.status == mf.Status.NOT_FINITE
    assert "not finite at step 0" in tuned.message


def test_a_kink_is_where_no_step_helps(x64):
    tuned = mf.tune(network(1), growing(math.log(0.1)))
    assert tuned.status == mf.Status.STALLED
    assert float(tuned.after.eta_max()) == pytest.approx(0.1, rel=1e-6)
    assert "no step" in tuned.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(over="scale"),
            r"over='scale': no layer .* use one or more of beta, bias_var, gamma, weight_var",
        ),
        (dict(over=()), r"over=\(\): no layer"),
        (dict(over=("gamma", "alpha")), "over="),
        (dict(bounds=dict(beta=(0, 1))), r"bounds\['beta'\]=\(0, 1\): .* not tuned; use one of g"),
        (dict(bounds=dict(gamma=(-1, 1))), "and not negative"),
        (dict(bounds=dict(gamma=(3, 1))), "the lower one first"),
        (dict(bounds=dict(gamma=(2, 3))), r"layers/1.gamma=1.0: must be above 2 and below 3"),
        (dict(max_steps=0), "max_steps=0"),
        (dict(momentum=1.0), "momentum=1.0: outside"),
        (dict(statistics="train"), "statistics='train'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(mf.SpecError, match=message):
        mf.tune(network(1), lowest, **options)


def test_starts_and_objectives_that_make_no_sense():
    with pytest.raises(mf.SpecError, match=r"layers/1.gamma=0.0: must be above 0"):
        mf.tune(network(1, gamma=0.0), lowest)
    with pytest.raises(mf.SpecError, match="return one real number"):
        mf.tune(network(1), lambda theory: theory.order_parameters.q)
    with pytest.raises(mf.SpecError, match="value=-1: must be a finite positive number"):
        objectives.target_eta_max(-1)
    with pytest.raises(mf.SpecError, match="momentum=2: outside"):
        objectives.target_eta_max(0.1, momentum=2)
    with pytest.raises(mf.SpecError, match="rate='stable': unknown; use one of quadratic"):
        objectives.target_rate(0.1, "stable")
    theory = mf.analyze(network(1), data=np.random.default_rng(0).standard_normal((9, 784)))
    with pytest.raises(mf.SpecError, match="data=None: the theory is that of a batch"):
        objectives.target_rate(0.1)(theory)


def test_objectives_say_what_they_are():
    assert repr(objectives.target_eta_max(0.1)) == "target_eta_max(value=0.1, momentum=0.9)"
    expected = "target_rate(value=0.1, momentum=0.9, rate='bounded')"
    assert repr(objectives.target_rate(0.1, "bounded")) == expected
    assert objectives.equal_shares() == objectives.equal_shares()


@pytest.mark.slow
def test_the_command_writes_picture_and_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["tune", "--widths", "300", "300", "--output", "t.png", "--save", "net.json"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "layers/4" in shown.out
    assert "wrote t.png net.json" in shown.err
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    net = mf.Network.from_json((tmp_path / "net.json").read_text())
    assert float(mf.analyze(net).eta_max()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.slow
def test_the_command_fails_in_one_line(capsys):
    command = ["tune", "--widths", "300", "300", "--objective", "unit_growth", "--json"]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert parsed("tune", shown.out)["attributes"]["status"] == "independent"
    assert shown.err.startswith("meanfield-jax: the objective does not depend on gamma")
    assert main([*command, "--value", "3"]) == 2
    assert "unit_growth has no value" in capsys.readouterr().err
