"""Gradients before the step: missing ones, lists, those that overwrite; the forms of sparse ones."""

import warnings

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from axes import ALL_CASES, CLASSES
from like_sgd import CLASSES_FUSED, NEWER_KERAS, ONES, START, assert_close, gradient, like_sgd, variable
from strategies import strategy_of

import tf_adam_variants as tav
from tf_adam_variants.optimizer import gradients
from tf_adam_variants.optimizer.gradients import Form


@CLASSES_FUSED
def test_gradients_that_are_none(cls, fused):
    """None of them is an error and no step; one of several is a warning, and the others step."""
    optimizer, first, second = like_sgd(cls, fused=fused), variable(START + 2), variable(START + 2)
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(None, first)])
    optimizer = like_sgd(cls, fused=fused)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(None, first), (gradient(ONES), second)])
    assert_close(first, [[3.0, 4.0], [5.0, 6.0]], 0)
    assert_close(second, [[2.0, 3.0], [4.0, 5.0]])


@ALL_CASES
def test_a_missing_gradient_leaves_its_variable_alone(case):
    weights = cases.variables(cases.problem(1)[0], tf.float32)
    before = [w.numpy() for w in weights]
    grads = [tf.ones_like(w) if i != 2 else None for i, w in enumerate(weights)]
    with warnings.catch_warnings(action="ignore"):  # that it is missing
        case.cls(**case.terms).apply(grads, weights)
    changed = [not np.array_equal(w.numpy(), b) for w, b in zip(weights, before, strict=True)]
    assert changed == [True, True, False, True]


@NEWER_KERAS
@CLASSES_FUSED
def test_keras_s_variables_beside_tensorflow_s(cls, fused):
    ours, theirs = variable(), tf.Variable(START, name="theirs")
    optimizer = like_sgd(cls, fused=fused)
    optimizer.apply_gradients([(gradient(ONES), ours), (gradient(ONES), theirs)])
    assert int(optimizer.iterations) == 1
    with pytest.warns(UserWarning, match="Gradients do not exist for variables.*theirs"):
        optimizer.apply_gradients([(gradient(ONES), ours), (None, theirs)])
    assert int(optimizer.iterations) == 2
    assert_close(ours, START - 2)
    assert_close(theirs, START - 1)


@CLASSES_FUSED
def test_a_gradient_that_overwrites_its_variable(cls, fused):
    """As float8 scales do. It has no slots."""
    overwritten, trained = variable(), variable()
    overwritten.overwrite_with_gradient = True
    optimizer = like_sgd(cls, fused=fused)
    optimizer.apply_gradients([(gradient(ONES), overwritten), (gradient(ONES), trained)])
    assert_close(overwritten, ONES, 0)
    assert_close(trained, [[0.0, 1.0], [2.0, 3.0]])
    assert len([v for v in optimizer.variables if tuple(v.shape) == (2, 2)]) == 2


NAMED = [0, 2, 4]


@CLASSES_FUSED
def test_gradients_and_indices_as_lists(cls, fused):
    """Keras makes tensors of them, of the variable's type."""
    weights, table = tf.Variable(np.ones(2)), tf.Variable(np.ones((5, 2)))
    twins = tf.Variable(np.ones(2)), tf.Variable(np.ones((5, 2)))
    values, whole = np.full((3, 2), 0.5), np.zeros((5, 2))
    whole[NAMED] = values
    for indices in (NAMED, tuple(NAMED)):
        cls(fused=fused).apply(
            [[0.1, -0.3], tf.IndexedSlices(tf.constant(values), indices, (5, 2))], [weights, table]
        )
        cls(fused=fused).apply([tf.constant([0.1, -0.3], tf.float64), tf.constant(whole)], twins)
    assert_close(weights, twins[0].numpy(), 1e-14)
    assert_close(table, twins[1].numpy(), 1e-14)


@pytest.fixture
def weights():
    return [tf.Variable([1.0, 2.0], name="a"), tf.Variable([[3.0]], name="b")]


GOOD = ([1.0, 1.0], [[1.0]])


def is_unchanged(optimizer, weights):
    return (
        [w.numpy().tolist() for w in weights] == [[1.0, 2.0], [[3.0]]]
        and int(optimizer._iterations) == 0
        and all(np.all(v.numpy() == 0) for v in optimizer.variables if v is not optimizer.learning_rate)
    )


@CLASSES
def test_gradients_that_do_not_match(cls, weights):
    optimizer = cls()
    optimizer.build(weights)
    wrong = [
        ([GOOD[0]], weights, "one gradient a variable.*1 gradients for 2 variables: a, b"),
        ([GOOD[0]], None, "one gradient a variable"),
        ([*GOOD, [1.0]], None, "3 gradients for 2"),
        ([GOOD[0], [1.0, 2.0]], weights, r"gradient of b must have its shape, \(1, 1\).*\(2,\)"),
        ([GOOD[1], GOOD[0]], None, "gradient of a"),
        ([GOOD[0], tf.IndexedSlices(tf.ones((1, 2)), [0])], weights, "gradient of b"),
        ([None, None], weights, "No gradients"),
        ([GOOD[0], GOOD[0]], [weights[0], weights[0]], "more than once"),
    ]
    for grads, variables, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.apply(
                [g if g is None or isinstance(g, tf.IndexedSlices) else tf.constant(g) for g in grads],
                variables,
            )
    assert is_unchanged(optimizer, weights)


def test_a_variable_that_it_was_not_built_on(weights):
    optimizer = tav.LAMB()
    optimizer.build(weights[:1])
    with pytest.raises(ValueError, match=r"Unknown variables: b\."):
        optimizer.apply([tf.ones(2), tf.ones((1, 1))], weights)
    assert is_unchanged(optimizer, weights)


def test_no_variables_and_not_built():
    with pytest.raises(ValueError, match="built"):
        tav.AdamW().apply([tf.ones(2)])


def test_built_twice(weights):
    optimizer = tav.QHAdam()
    optimizer.build(weights)
    count = len(optimizer.variables)
    optimizer.build(weights)
    assert len(optimizer.variables) == count
    for known in (weights[:1], weights[::-1], []):
        optimizer.build(known)
        assert len(optimizer.variables) == count
    with pytest.raises(ValueError, match=r"c of type.*int32"):
        optimizer.build([*weights, tf.Variable(1, name="c")])
    assert len(optimizer.variables) == count
    assert is_unchanged(optimizer, weights)


@pytest.mark.parametrize("dtype", [tf.int32, tf.complex64])
def test_variables_that_are_not_real(dtype):
    with pytest.raises(ValueError, match=f"w of type.*{dtype.name}"):
        tav.AdamW().build([tf.Variable(tf.ones(2, dtype), name="w")])


def test_an_infinite_gradient_is_not_hidden(weights):
    optimizer = tav.AdamW()
    optimizer.apply([tf.constant([np.inf, 1.0]), tf.ones((1, 1))], weights)
    assert np.isnan(weights[0].numpy()[0])
    assert np.all(np.isfinite(weights[0].numpy()[1:]))


@CLASSES
def test_a_variable_twice_is_an_error(cls):
    weights = tf.Variable([1.0, 2.0], name="w")
    for action in (
        lambda: cls().build([weights, weights]),
        lambda: cls().apply([tf.ones(2)] * 2, [weights, weights]),
    ):
        with pytest.raises(ValueError, match="given a variable more than once: w, w"):
            action()
    np.testing.assert_array_equal(weights, [1.0, 2.0])


@pytest.mark.parametrize("variable_class", [tf.Variable, keras.Variable])
def test_the_variable_that_is_given_twice_is_named(variable_class):
    """Not those that are given once, nor a namesake."""
    weights = [variable_class([1.0], name=f"w{i}") for i in range(9)]
    namesake = variable_class([1.0], name="w1")
    for given, named in (
        ([*weights, namesake, weights[7]], "w7, w7"),
        ([weights[8], *weights, weights[2]], "w8, w2, w8, w2"),
    ):
        for action in (
            lambda given=given: tav.AdamW().build(given),
            lambda given=given: tav.AdamW().apply([tf.ones(1)] * len(given), given),
        ):
            with pytest.raises(ValueError, match=f"given a variable more than once: {named}$"):
                action()


@pytest.mark.parametrize("variable_class", [tf.Variable, keras.Variable])
@CLASSES
def test_a_variable_in_place_of_a_list_is_an_error(cls, variable_class):
    weights = variable_class([1.0, 2.0], name="w")
    for action in (lambda: cls().build(weights), lambda: cls().apply([tf.ones(2)], weights)):
        with pytest.raises(ValueError, match=r"needs a list of variables\. Received: the variable w alone"):
            action()
    np.testing.assert_array_equal(weights.numpy(), [1.0, 2.0])


# -- the forms of a sparse gradient: indices, values, and what they become

SLICES = {
    "repeated": ([3, 1, 3, 3], [1.0, 2.0, 4.0, -8.0]),
    "once": ([2, 0], [0.5, -0.25]),
    "in order": ([0, 1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0, 5.0]),
    "none": ([], []),
}
ROWS = 5


def make_slices(kind, dtype, indices_dtype=tf.int64):
    indices, values = SLICES[kind]
    values = tf.reshape(tf.constant(values, dtype), (-1, 1)) * tf.ones((1, 2), dtype)
    return tf.IndexedSlices(values, tf.constant(indices, indices_dtype), tf.constant([ROWS, 2]))


def to_dense(gradient):
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.cast(gradient, tf.float64).numpy()
    total = np.zeros((ROWS + 1, 2))  # padding is in the last row
    np.add.at(total, gradient.indices.numpy(), tf.cast(gradient.values, tf.float64).numpy())
    return total[:ROWS]


@axes.pairwise(
    xla_is_slow=False,
    kind=list(SLICES),
    form=list(Form),
    loss_scale=[None, 4.0],
    dtype=["float16", "bfloat16", "float32", "float64"],
    indices_dtype=[tf.int32, tf.int64],
    mode=["eager", "graph", "xla"],
)
def test_the_form_of_a_sparse_gradient(kind, form, loss_scale, dtype, indices_dtype, mode):
    variable = tf.Variable(tf.zeros((ROWS, 2), dtype))
    slices = make_slices(kind, dtype, indices_dtype)

    def prepare(values, indices):
        return gradients.prepare(tf.IndexedSlices(values, indices), variable, form, loss_scale, False)

    run = prepare if mode == "eager" else tf.function(prepare, jit_compile=mode == "xla")
    prepared = run(slices.values, slices.indices)
    np.testing.assert_array_equal(to_dense(prepared), to_dense(slices) / (loss_scale or 1.0))
    arithmetic = "float64" if dtype == "float64" else "float32"
    if form is Form.DENSE:
        assert not isinstance(prepared, tf.IndexedSlices)
        assert prepared.dtype == arithmetic
    if form is Form.UNIQUE_ROWS:
        named = [i for i in prepared.indices.numpy() if i != ROWS]
        assert sorted(named) == sorted(set(slices.indices.numpy()))
        assert len(prepared.indices) == len(slices.indices if mode == "xla" else named)
        assert prepared.values.dtype == arithmetic
    if form is Form.ROWS:
        np.testing.assert_array_equal(prepared.indices, slices.indices)


@pytest.mark.parametrize(
    ("loss_scale", "accumulates", "expected_dtype"),
    [(None, False, "bfloat16"), (None, True, "float32"), (8.0, False, "float32"), (8.0, True, "float32")],
)
def test_a_dense_gradient_is_widened_where_it_is_divided_or_added_up(loss_scale, accumulates, expected_dtype):
    weights = tf.Variable(tf.zeros(3, tf.bfloat16))
    dense = tf.constant([1.0, -2.0, 3.0], tf.bfloat16)
    prepared = gradients.prepare(dense, weights, Form.DENSE, loss_scale, accumulates)
    assert prepared.dtype == expected_dtype
    np.testing.assert_array_equal(tf.cast(prepared, tf.float32) * (loss_scale or 1.0), [1.0, -2.0, 3.0])


# Options of the optimizer, and the form of its sparse gradients without and with the fused kernels.
FORMS = [
    ({}, Form.DENSE, Form.ROWS),
    ({"sparse_update": "lazy"}, Form.UNIQUE_ROWS, Form.ROWS),
    ({"clipnorm": 1.0}, Form.DENSE, Form.UNIQUE_ROWS),
    ({"clipvalue": 1.0}, Form.DENSE, Form.UNIQUE_ROWS),
    ({"global_clipnorm": 1.0, "sparse_update": "lazy"}, Form.UNIQUE_ROWS, Form.UNIQUE_ROWS),
    ({"loss_scale_factor": 2.0}, Form.DENSE, Form.UNIQUE_ROWS),
    ({"gradient_accumulation_steps": 2}, Form.DENSE, Form.DENSE),
    ({"gradient_accumulation_steps": 2, "sparse_update": "lazy"}, Form.DENSE, Form.DENSE),
]


@pytest.mark.parametrize(("options", "unfused", "fused"), FORMS, ids=axes.name_value)
def test_which_form_an_optimizer_asks_for(options, unfused, fused):
    for use_fused, expected in ((False, unfused), (True, fused)):
        optimizer = tav.AdamW(fused=use_fused, **options)
        optimizer.build([tf.Variable(tf.zeros((ROWS, 2)))])
        assert optimizer._form("float32") is expected


@pytest.mark.parametrize("kind", SLICES)
def test_unique_rows_on_one_replica_is_the_gradient(kind):
    """Repeated indices were summed before; only the sum over replicas repeats them again."""
    slices, variable = make_slices(kind, "float32"), tf.Variable(tf.zeros((ROWS, 2)))
    assert gradients.unique_rows(slices, variable) is slices
    dense = tf.ones((ROWS, 2))
    assert gradients.unique_rows(dense, variable) is dense


@pytest.mark.parametrize("kind", SLICES)
def test_unique_rows_of_two_replicas(kind):
    """Their sum is the IndexedSlices of both: each index that both name is repeated, and then summed."""
    rows = tf.Variable(tf.zeros((ROWS, 2)))
    own = gradients.prepare(make_slices(kind, "float32"), rows, Form.UNIQUE_ROWS, None, False)
    both = tf.IndexedSlices(*(tf.concat([x, x], axis=0) for x in (own.values, own.indices)))
    with strategy_of("two replicas").scope():
        unique = gradients.unique_rows(both, rows)
        assert gradients.unique_rows(tf.ones((ROWS, 2)), rows).shape == (ROWS, 2)
    assert sorted(unique.indices.numpy()) == sorted(set(SLICES[kind][0]))
    np.testing.assert_array_equal(to_dense(unique), 2 * to_dense(make_slices(kind, "float32")))


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_nonzero_rows(mode):
    dense = np.zeros((ROWS, 2), "float32")
    dense[1, 0], dense[4] = 3.0, -1.0
    run = gradients.nonzero_rows if mode == "eager" else tf.function(gradients.nonzero_rows, jit_compile=True)
    for all_rows, rows in ((False, [1, 4]), (True, [*range(ROWS)])):
        slices = run(tf.constant(dense), tf.constant(all_rows))
        assert [i for i in slices.indices.numpy() if i != ROWS] == rows
        np.testing.assert_array_equal(to_dense(slices), dense)
