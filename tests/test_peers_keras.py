"""What Keras's tests ask of an optimizer: optimizer_test, optimizer_sparse_test, adamw_test and lamb_test.

docs/peers.md has the table. Many of Keras's numbers are SGD's with a gradient of ones. Adam's moments of a
constant gradient are the gradient and its square, so that without epsilon, decay and trust ratio a step of
every optimizer here is SGD's, whatever its betas and nus.
"""

import copy
import functools
import pickle

import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

import tf_adam_variants as tav

LIKE_SGD = {
    tav.AdamW: {"weight_decay": 0.0, "epsilon": 0.0},
    tav.QHAdam: {"epsilon": 0.0},
    tav.QHAdamW: {"weight_decay": 0.0, "epsilon": 0.0},
    tav.LAMB: {"weight_decay": 0.0, "epsilon": 0.0, "exclude_from_layer_adaptation": ["."]},
}
CLASSES = pytest.mark.parametrize("cls", LIKE_SGD, ids=lambda cls: cls.__name__)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["pure", "fused"])
ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)

# Keras 3.6 has no MultiOptimizer, and does some of what its tests ask for today wrongly itself.
NEWER = pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras is older than it")

START = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
ONES = np.ones((2, 2), "float32")


def like_sgd(cls, learning_rate=1.0, **options):
    return cls(learning_rate, **LIKE_SGD[cls], **options)


def variable(value=START, **options):
    return keras.Variable(np.asarray(value, "float32"), **options)


def gradient(values, how="dense"):
    """The same gradient in one piece, or in slices of its rows."""
    values = tf.constant(values, tf.float32)
    if how == "dense":
        return values
    return tf.IndexedSlices(
        values, tf.range(len(values)), values.shape
    )  # Keras's loss scale asks for a shape


def options(how):
    return {} if how == "dense" else {"sparse_update": how}


HOW = pytest.mark.parametrize("how", ["dense", "exact", "lazy"])


def slot(optimizer, name, i=0):
    """The i-th of the slots of this name."""
    return [v.numpy() for v in optimizer.variables if v.path.endswith(name)][i]


def close(have, want, tolerance=1e-6):
    have = have.numpy() if hasattr(have, "numpy") else have
    np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance)


# -- optimizer_test ------------------------------------------------------------------------------------------


@HOW
@FUSED
@CLASSES
def test_iterations_count_steps(cls, fused, how):
    optimizer, weights = cls(fused=fused, **options(how)), variable()
    assert int(optimizer.iterations) == 0
    for count in (1, 2):
        assert int(optimizer.apply_gradients([(gradient(ONES, how), weights)])) == count
        assert int(optimizer.iterations) == count


@FUSED
@CLASSES
def test_gradients_that_are_none(cls, fused):
    """None of them is an error and no step; one of several is a warning, and the others step."""
    optimizer, first, second = like_sgd(cls, fused=fused), variable(START + 2), variable(START + 2)
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(None, first)])
    optimizer = like_sgd(cls, fused=fused)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(None, first), (gradient(ONES), second)])
    close(first, [[3.0, 4.0], [5.0, 6.0]], 0)
    close(second, [[2.0, 3.0], [4.0, 5.0]])


CLIPPED = [
    ({"clipnorm": 1.0}, [100.0, 100.0], [2**0.5 / 2, 2**0.5 / 2]),
    ({"clipvalue": 1.0}, [100.0, 100.0], [1.0, 1.0]),
    ({"global_clipnorm": 1.0}, [50.0, 100.0], [50 / 12_500**0.5, 100 / 12_500**0.5]),
]


@HOW
@FUSED
@pytest.mark.parametrize(("clipping", "values", "clipped"), CLIPPED, ids=lambda v: "-".join(map(str, v)))
@CLASSES
def test_gradients_are_clipped(cls, clipping, values, clipped, fused, how):
    """With beta_1 = 0 the first moment is the gradient that the step was taken with."""
    optimizer = cls(beta_1=0.0, fused=fused, **clipping, **options(how))
    optimizer.apply([gradient(values, how)], [variable([1.0, 2.0])])
    close(slot(optimizer, "_momentum"), clipped)


@HOW
@FUSED
@CLASSES
def test_an_average_of_the_weights_overwrites_them(cls, fused, how):
    weights = variable(START + 2)
    optimizer = like_sgd(
        cls, fused=fused, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3, **options(how)
    )
    for want, average in ((START + 1, START + 1), (START, START + 0.9), (START + 0.71, START + 0.71)):
        optimizer.apply([gradient(ONES, how)], [weights])
        close(weights, want)
        close(slot(optimizer, "_average"), average)


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize("case", [case for case in cases.CASES if not case.terms], ids=lambda case: case.name)
def test_fit_ends_with_the_average(case, run_eagerly):
    """Weights of 1, an input of 1 and a target of 0: the gradient of the mean square is the weight."""
    layer = keras.layers.Dense(2, kernel_initializer="ones", use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(
        case.cls(0.125, use_ema=True, ema_momentum=0.75, **case.told), "mse", run_eagerly=run_eagerly
    )
    model.fit(np.ones((1, 1)), np.zeros((1, 1)), batch_size=1, epochs=2, verbose=0)
    told, weights, slots, steps = dict(case.told), np.ones((1, 2)), {}, []
    decay = told.pop("weight_decay", 0.0) * (1.0 if case.cls is tav.LAMB else 0.125)
    for t in (1, 2):
        weights = case.rule(weights, weights, t, slots, 0.125, decay, **told)
        steps.append(weights)
    want = 0.75 * steps[0] + 0.25 * steps[1]
    close(layer.kernel, want, 2e-6)
    close(slot(model.optimizer, "_average"), want, 2e-6)


@FUSED
@CLASSES
def test_constraints_are_applied(cls, fused):
    weights = variable(np.random.default_rng(0).uniform(size=(2, 2)) - 1.0)
    weights.constraint = keras.constraints.NonNeg()
    cls(1e-4, fused=fused).apply([gradient(0 * ONES)], [weights])
    assert np.min(weights) == 0


@HOW
@FUSED
@CLASSES
def test_a_loss_scale_divides_the_gradient(cls, fused, how):
    weights, twin = variable(), variable()
    optimizer = cls(1.0, fused=fused, loss_scale_factor=1024.0, beta_1=0.0, **options(how))
    assert optimizer.scale_loss(1.0) == 1024.0
    optimizer.apply([gradient(START * 1024, how)], [weights])
    close(slot(optimizer, "_momentum"), START)
    cls(1.0, fused=fused, beta_1=0.0, **options(how)).apply([gradient(START, how)], [twin])
    np.testing.assert_array_equal(weights, twin)


@ALL_CASES
def test_weights_of_one_optimizer_set_in_another(case):
    weights = variable()
    optimizer, other = case.cls(**case.terms), case.cls(**case.terms)
    optimizer.apply([gradient(START)], [weights])
    with pytest.raises(ValueError, match="You are calling"):
        other.set_weights(optimizer.variables)
    other.build([weights])
    other.set_weights(optimizer.variables)
    assert len(other.variables) == len(optimizer.variables) >= 4
    for have, want in zip(other.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(have, want)


@HOW
@FUSED
@CLASSES
def test_gradients_accumulate(cls, fused, how):
    optimizer = like_sgd(cls, fused=fused, gradient_accumulation_steps=3, **options(how))
    weights = variable()
    for count, moved, waiting in ((1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)):
        optimizer.apply([gradient(ONES, how)], [weights])
        close(weights, START - moved)
        close(slot(optimizer, "_gradient_accumulator"), waiting * ONES)
        assert int(optimizer.variables[0]) == count


@CLASSES
def test_a_checkpoint_takes_training_back(cls, tmp_path):
    """Restored into the optimizer that went on in the meantime, which then takes the same step again."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(cls(0.125), "mse")
    x, y = np.random.default_rng(0).uniform(size=(2, 1, 2))
    model.train_on_batch(x, y)
    before = model.predict(x, verbose=0)
    checkpoint = tf.train.Checkpoint(model, optimizer=model.optimizer)
    path = checkpoint.save(tmp_path / "checkpoint")
    model.train_on_batch(x, y)
    after = model.predict(x, verbose=0)
    assert np.max(np.abs(after - before)) > 1e-3
    checkpoint.restore(path)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(model.predict(x, verbose=0), after)


@pytest.mark.parametrize("mode", cases.MODES)
@CLASSES
def test_a_callable_is_a_learning_rate(cls, mode):
    weights, rate = variable(), tf.Variable(0.1)
    optimizer = like_sgd(cls, rate.read_value)
    assert int(optimizer.iterations) == 0
    step = cases.apply_in(mode, optimizer, [weights])
    step([gradient(ONES)])
    close(weights, START - 0.1)
    assert int(optimizer.iterations) == 1
    rate.assign(0.2)  # asked for in every step
    step([gradient(ONES)])
    close(weights, START - 0.3)


@FUSED
@CLASSES
def test_a_gradient_that_overwrites_its_variable(cls, fused):
    """As float8 scales do. It has no slots."""
    overwritten, trained = variable(), variable()
    overwritten.overwrite_with_gradient = True
    optimizer = like_sgd(cls, fused=fused)
    optimizer.apply_gradients([(gradient(ONES), overwritten), (gradient(ONES), trained)])
    close(overwritten, ONES, 0)
    close(trained, [[0.0, 1.0], [2.0, 3.0]])
    assert len([v for v in optimizer.variables if tuple(v.shape) == (2, 2)]) == 2


@FUSED
@CLASSES
def test_an_overwriting_gradient_accumulates_its_maximum(cls, fused):
    overwritten, trained = variable(), variable()
    overwritten.overwrite_with_gradient = True
    optimizer = like_sgd(cls, fused=fused, gradient_accumulation_steps=2)
    expected = [
        (1, START, START, (1, 1)),
        (2, 2 * ONES, START - 1, (0, 0)),  # a first step is of the rate's length, not 1.5 times it as SGD's
        (1, 2 * ONES, START - 1, (1, 1)),
    ]
    for size, first, second, waiting in expected:
        optimizer.apply([gradient(size * ONES)] * 2, [overwritten, trained])
        close(overwritten, first, 0)
        close(trained, second)
        for i in (0, 1):
            close(slot(optimizer, "_gradient_accumulator", i), waiting[i] * ONES)
    close(slot(optimizer, "_momentum"), (1 - optimizer.beta_1) * 1.5 * ONES)


@CLASSES
def test_a_schedule_in_place_of_a_float_takes_the_rate_s_variable_away(cls):
    optimizer = cls(0.25)
    assert len(optimizer.variables) == 2
    optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(optimizer.learning_rate, 4)
    assert len(optimizer.variables) == 1
    assert float(optimizer.learning_rate) == 0.25
    optimizer.apply([gradient(ONES)], [variable()])
    assert float(optimizer.learning_rate) == pytest.approx(0.25 - 0.2499 / 4)


@pytest.mark.parametrize(
    "copied", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy], ids=["pickled", "deepcopied"]
)
@ALL_CASES
def test_a_copy_of_an_optimizer_goes_on(case, copied):
    """Keras copies the configuration alone, and warns that the state is skipped."""
    optimizer = case.cls(0.125, exclude_from_weight_decay=["norm"], **case.told)
    inits, grads = cases.problem(4)
    weights = cases.variables(inits, tf.float64)
    for step in grads[:2]:
        optimizer.apply(list(map(tf.constant, step)), weights)
    again, others = copied(optimizer), cases.variables([w.numpy() for w in weights], tf.float64)
    assert type(again) is case.cls
    assert again.get_config() == optimizer.get_config()
    for step in grads[2:]:
        optimizer.apply(list(map(tf.constant, step)), weights)
        again.apply(list(map(tf.constant, step)), others)
    for have, want in zip([*others, *again.variables], [*weights, *optimizer.variables], strict=True):
        np.testing.assert_array_equal(have, want)


@NEWER
@FUSED
@CLASSES
def test_keras_s_variables_beside_tensorflow_s(cls, fused):
    ours, theirs = variable(), tf.Variable(START, name="theirs")
    optimizer = like_sgd(cls, fused=fused)
    optimizer.apply_gradients([(gradient(ONES), ours), (gradient(ONES), theirs)])
    assert int(optimizer.iterations) == 1
    with pytest.warns(UserWarning, match="Gradients do not exist for variables.*theirs"):
        optimizer.apply_gradients([(gradient(ONES), ours), (None, theirs)])
    assert int(optimizer.iterations) == 2
    close(ours, START - 2)
    close(theirs, START - 1)


@CLASSES
def test_names_do_not_depend_on_what_was_made_before(cls):
    """Keras 3.15 numbers them: a slot's path depends there on the optimizers that a process made before."""
    first, second, named = cls(), cls(), cls(name="mine")
    assert first.name == second.name == cls.__name__.lower()
    assert named.name == "mine"
    for optimizer in (first, named):
        again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert again.name == optimizer.name
    named.build([variable(name="w")])
    assert [v.path for v in named.variables] == [
        f"mine/{end}" for end in ("iteration", "learning_rate", "w_momentum", "w_velocity")
    ]


@FUSED
@CLASSES
def test_gradients_and_ids_as_lists(cls, fused):
    """Keras makes tensors of them, of the variable's type."""
    weights, table = tf.Variable(np.ones(2)), tf.Variable(np.ones((5, 2)))
    twins = tf.Variable(np.ones(2)), tf.Variable(np.ones((5, 2)))
    values, whole = np.full((3, 2), 0.5), np.zeros((5, 2))
    whole[NAMED] = values
    for ids in (NAMED, tuple(NAMED)):
        cls(fused=fused).apply(
            [[0.1, -0.3], tf.IndexedSlices(tf.constant(values), ids, (5, 2))], [weights, table]
        )
        cls(fused=fused).apply([tf.constant([0.1, -0.3], tf.float64), tf.constant(whole)], twins)
    close(weights, twins[0].numpy(), 1e-14)
    close(table, twins[1].numpy(), 1e-14)


# -- optimizer_sparse_test -----------------------------------------------------------------------------------

NAMED = [0, 2, 4]


def trained(case, table, step_grads, fused, sparse, wrapped=False, **others):
    """The table after each gradient: `step_grads` are the values of the rows in NAMED."""
    weights = tf.Variable(table)
    optimizer = case.cls(0.0625, fused=fused, **case.told, **others)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    history = []
    for values in step_grads:
        values = values * 2 if wrapped else values
        if sparse:
            step = tf.IndexedSlices(tf.constant(values), tf.constant(NAMED), table.shape)
        else:
            whole = np.zeros_like(table)
            whole[NAMED] = values
            step = tf.constant(whole)
        optimizer.apply([step], [weights])
        history.append([weights.numpy()])
    return history


GRADIENTS = [np.full((3, 3, 2), 10.0 - step) for step in range(5)]


@FUSED
@ALL_CASES
def test_a_sparse_gradient_is_the_dense_one(case, fused):
    """Alone, and under a loss scale."""
    table = np.ones((5, 3, 2))
    want = trained(case, table, GRADIENTS, fused, False)
    assert np.all(np.abs(want[-1][0] - 1)[NAMED] > 0.05)
    for wrapped in (False, True):
        assert cases.worst(trained(case, table, GRADIENTS, fused, True, wrapped), want) < 1e-13


@FUSED
@ALL_CASES
def test_a_lazy_gradient_is_the_dense_one_of_the_rows_that_it_names(case, fused):
    have = trained(case, np.ones((5, 3, 2)), GRADIENTS, fused, True, sparse_update="lazy")
    rows, grads = np.ones((3, 3, 2)), [[values] for values in GRADIENTS]
    want = oracle.train(case.rule, [rows], grads, [0.0625] * 5, **case.told)
    assert cases.worst([[step[0][NAMED]] for step in have], want) < 1e-12
    np.testing.assert_array_equal(have[-1][0][[1, 3]], 1.0)


@FUSED
@ALL_CASES
def test_which_rows_a_sparse_gradient_moves(case, fused):
    """Exact: the others by their decay, and by their moments if they were named before. Lazy: no others."""
    for how in ("exact", "lazy"):
        weights = tf.Variable(np.ones((5, 10)))
        optimizer = case.cls(0.0625, fused=fused, sparse_update=how, **case.told)
        for ids in (NAMED, [0]):
            before = weights.numpy()
            values = tf.fill((len(ids), 10), tf.constant(0.5, tf.float64))
            optimizer.apply([tf.IndexedSlices(values, tf.constant(ids))], [weights])
            moved = np.any(weights.numpy() != before, axis=1)
            if how == "lazy":
                assert list(np.flatnonzero(moved)) == ids
            else:
                assert np.all(moved[NAMED])
                assert np.all(moved[[1, 3]] == case.decays)


# -- adamw_test ----------------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("cls", [tav.AdamW, tav.QHAdamW])
def test_a_single_step_of_adamw(cls, fused):
    weights = variable([1.0, 2.0, 3.0, 4.0])
    cls(0.5, weight_decay=0.004, fused=fused).apply([gradient([1.0, 6.0, 7.0, 2.0])], [weights])
    close(weights, [0.4980, 1.4960, 2.494, 3.492], 1e-4)


def decayed_three_times(cls, **arguments):
    """Three optimizers at a rate of 1 and zero gradients: one variable decays in each, two are excluded."""
    decayed, named, listed = variable(2.0), variable(2.0, name="exclude"), variable(2.0)
    optimizers = [cls(1.0, weight_decay=0.004, **arguments) for _ in range(3)]
    optimizers[1].exclude_from_weight_decay(var_names=["exclude"])
    optimizers[2].exclude_from_weight_decay(var_list=[listed])
    for optimizer, others in zip(optimizers, ([], [named], [listed]), strict=True):
        optimizer.apply([gradient(0.0)] * (1 + len(others)), [decayed, *others])
    return [float(v) for v in (decayed, named, listed)]


@FUSED
@pytest.mark.parametrize("cls", [tav.AdamW, tav.QHAdamW])
def test_weight_decay_and_who_is_excluded(cls, fused):
    close(decayed_three_times(cls, fused=fused), [1.9760959, 2.0, 2.0], 1e-6)


@FUSED
@pytest.mark.parametrize("made", [tf.Variable, keras.Variable])
@pytest.mark.parametrize("cls", [tav.AdamW, tav.QHAdamW, tav.LAMB])
def test_a_variable_is_excluded_and_not_its_namesake(cls, made, fused):
    weights = [made([1.0, 2.0], name="w") for _ in range(3)]
    optimizer = cls(0.5, weight_decay=0.5, fused=fused)
    optimizer.exclude_from_weight_decay(var_list=weights[1:2])
    optimizer.apply([gradient([0.0, 0.0])] * 3, weights)
    assert [bool(np.all(w.numpy() == [1.0, 2.0])) for w in weights] == [False, True, False]


# Keras's numbers for AdamW(1.0, weight_decay=0.5, epsilon=2): gradients of 0.01, then of 0.1 to 1.
FIRST, THEN = np.full(10, 0.01), np.arange(0.1, 1.1, 0.1)
GOLDEN = np.array(
    [
        [0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998],
        [0.2486, 0.2475, 0.2463, 0.2451, 0.2440, 0.2428, 0.2417, 0.2405, 0.2394, 0.2382],
        [0.1223, 0.1198, 0.1174, 0.1149, 0.1124, 0.1100, 0.1075, 0.1051, 0.1027, 0.1003],
        [0.0586, 0.0549, 0.0512, 0.0475, 0.0439, 0.0402, 0.0366, 0.0330, 0.0294, 0.0258],
        [0.0263, 0.0215, 0.0167, 0.0120, 0.0073, 0.0026, -0.0021, -0.0067, -0.0113, -0.0159],
    ]
)

BETAS = {"beta_1": 0.9, "beta_2": 0.999}
ADAMW = pytest.mark.parametrize(
    "make",
    [
        functools.partial(tav.AdamW, 1.0, weight_decay=0.5, **BETAS),
        functools.partial(tav.QHAdamW, 1.0, weight_decay=0.5, nu_1=1.0, nu_2=1.0, **BETAS),
    ],
    ids=["AdamW", "QHAdamW"],
)


@FUSED
@ADAMW
def test_keras_s_golden_adamw_with_epsilon_where_keras_adds_it(make, fused):
    """Keras adds it before the bias correction of v, which at step t is 2 / sqrt(1 - 0.999**t) after it."""
    optimizer, weights = make(fused=fused), variable(np.ones(10))
    for t, want in enumerate(GOLDEN, 1):
        optimizer.epsilon = 2 / np.sqrt(1 - 0.999**t)
        optimizer.apply([gradient(FIRST if t == 1 else THEN)], [weights])
        close(weights, want, 5e-4)


@FUSED
@ADAMW
def test_keras_s_golden_adamw_with_epsilon_where_the_paper_has_it(make, fused):
    """The same problem by the paper's formula: 2 is not the 63 that Keras adds at the first step."""
    optimizer, weights = make(epsilon=2.0, fused=fused), tf.Variable(np.ones(10))
    grads = [[FIRST], *[[THEN]] * 4]
    history = []
    for step in grads:
        optimizer.apply([tf.constant(step[0])], [weights])
        history.append([weights.numpy()])
    told = BETAS | {"epsilon": 2.0, "weight_decay": 0.5}
    want = oracle.train(oracle.adamw, [np.ones(10)], grads, [1.0] * 5, **told)
    assert cases.worst(history, want) < 1e-12
    assert np.max(np.abs(want[1][0] - GOLDEN[1])) > 0.1


# -- lamb_test -----------------------------------------------------------------------------------------------


@FUSED
def test_a_single_step_of_lamb(fused):
    weights = variable([1.0, 2.0, 3.0, 4.0])
    tav.LAMB(0.5, weight_decay=0.0, fused=fused).apply([gradient([1.0, 6.0, 7.0, 2.0])], [weights])
    close(weights, [-0.3693, 0.6306, 1.6306, 2.6306], 1e-4)


@FUSED
def test_keras_s_golden_lamb(fused):
    optimizer, weights = tav.LAMB(0.001, weight_decay=0.0, fused=fused), variable(np.ones(10))
    for step, want in enumerate([0.999, 0.9982, 0.9974, 0.9965, 0.9955]):
        optimizer.apply([gradient(THEN if step else FIRST)], [weights])
        close(weights, np.full(10, want), 5e-4)


@FUSED
def test_lamb_s_decay_is_inside_its_trust_ratio(fused):
    """A zero gradient leaves the decay alone, and a step is of the weights' length times the rate of 1.

    Keras's Lamb decays by the rate times the decay, outside: to 1.9760959.
    """
    close(decayed_three_times(tav.LAMB, fused=fused), [0.0, 2.0, 2.0], 1e-6)
    weights = np.array(2.0)
    told = BETAS | {"epsilon": 1e-6, "weight_decay": 0.004}
    want = oracle.train(oracle.lamb, [weights], [[np.array(0.0)]], [1.0], **told)
    close(want[0][0], 0.0, 1e-12)
