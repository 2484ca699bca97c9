"""NaN, inf, zeros and denormals: which elements of which variable they reach, and no others."""

import axes
import cases
import keras
import numpy as np
import oracle
import tensorflow as tf
from axes import ALL_CASES, ALL_MODES, MODES_XLA_SLOW

import tf_adam_variants as tav

DENSE = (1, 2)  # the element of the first variable whose gradient is not finite
ROW, COLUMN = 3, 1  # that of the table
SIZE = (6, 3)
KERNEL, TABLE = 0, len(cases.SHAPES)
INDICES = ([5, ROW, 1, ROW], [2, 5, ROW], [0, 2])  # of the first step, the second and the third


class Run:
    """An optimizer on four dense variables and a table, which `steps` resets."""

    def __init__(self, optimizer, mode, dtype=tf.float32):
        inits, self.grads = cases.problem(3, seed=3)
        inits.append(np.random.default_rng(4).normal(size=SIZE))
        self.weights = cases.variables(inits, dtype, (*cases.PATHS, "table/embeddings"))
        self.apply = cases.apply_in(mode, optimizer, self.weights)
        self.optimizer, self.inits, self.dtype = optimizer, inits, dtype
        self.state = [*self.weights, *(v.value for v in optimizer.variables)]
        self.start = [v.numpy() for v in self.state]

    def gradients(self, bad=None):
        """Those of three steps; in the first one an element each of the kernel and the table is bad."""
        rng = np.random.default_rng(5)
        for t, indices in enumerate(INDICES):
            grads, values = [g.copy() for g in self.grads[t]], rng.normal(size=(len(indices), SIZE[1]))
            if t == 0 and bad is not None:
                grads[KERNEL][DENSE] = bad
                values[1, COLUMN] = bad
            slices = tf.IndexedSlices(
                tf.constant(values, self.dtype), tf.constant(indices), tf.constant(SIZE)
            )
            yield [*(tf.constant(g, self.dtype) for g in grads), slices]

    def steps(self, bad=None):
        """Each variable with its slots, after three steps."""
        for variable, value in zip(self.state, self.start, strict=True):
            variable.assign(value)
        for grads in self.gradients(bad):
            self.apply(grads)
        slots = [self.optimizer._momentums, self.optimizer._velocities]
        if getattr(self.optimizer, "amsgrad", False):
            slots.append(self.optimizer._velocity_hats)
        return [[w.numpy(), *(slot[i].value.numpy() for slot in slots)] for i, w in enumerate(self.weights)]


def place(i):
    """Where the bad element of a variable is; none in most of them."""
    where = np.zeros([*cases.SHAPES, SIZE][i], bool)
    if i == KERNEL:
        where[DENSE] = True
    if i == TABLE:
        where[ROW, COLUMN] = True
    return where


SOME_CASES = [cases.CASES[0], cases.CASES[6]]
# All cases eagerly, two in each mode.
CASES_AND_MODES = axes.pairwise(
    lambda row: row["mode"].endswith("eager") or row["case"] in SOME_CASES, case=cases.CASES, mode=cases.MODES
)


@axes.pairwise(
    lambda row: row["mode"].endswith("eager") or row["case"] in SOME_CASES,
    case=cases.CASES,
    mode=cases.MODES,
    sparse_update=["exact", "lazy"],
)
def test_what_is_not_finite_stays_in_its_element(case, mode, sparse_update):
    run = Run(case.cls(0.125, **case.terms, sparse_update=sparse_update), mode)
    twin = run.steps(1.0)
    for bad in (np.nan, np.inf, -np.inf):
        for i, (arrays, others) in enumerate(zip(run.steps(bad), twin, strict=True)):
            where = place(i)
            assert np.all(np.isnan(arrays[0][where]))  # and two good steps do not mend it
            for actual, expected in zip(arrays, others, strict=True):
                assert not np.any(np.isfinite(actual[where]))
                if case.cls is tav.LAMB and np.any(where):  # its norm of u is NaN, so that the ratio is 1
                    assert np.all(np.isfinite(actual[~where]))
                else:
                    np.testing.assert_array_equal(actual[~where], expected[~where])


@MODES_XLA_SLOW
def test_lamb_takes_a_trust_ratio_of_1_where_a_norm_is_nan(mode):
    case = cases.CASES[6]
    inits, grads = cases.problem(3, seed=3)
    grads[0][KERNEL][DENSE] = np.nan
    actual = cases.run(mode, case.cls(0.125, **case.terms), inits, grads)
    oracle_kwargs = case.oracle_kwargs | {"weight_decay": 0.01}
    expected = oracle.train(oracle.lamb, inits, grads, [0.125] * 3, **oracle_kwargs)
    ratio_1 = oracle.train(oracle.lamb, inits, grads, [0.125] * 3, **oracle_kwargs, adapted=[False] * 4)
    for step, oracles, plain in zip(actual, expected, ratio_1, strict=True):
        for i, (w, target) in enumerate(zip(step, oracles, strict=True)):
            np.testing.assert_allclose(w, target, rtol=1e-12)
            if i == KERNEL:
                np.testing.assert_allclose(w, plain[i], rtol=1e-12)


# -- clipping


@ALL_MODES
def test_clipvalue_makes_inf_finite_and_leaves_nan(mode):
    run = Run(tav.AdamW(0.125, clipvalue=0.5), mode)
    for bad, as_if in ((np.inf, 1e30), (-np.inf, -1e30)):
        for arrays, others in zip(run.steps(bad), run.steps(as_if), strict=True):
            for actual, expected in zip(arrays, others, strict=True):
                np.testing.assert_array_equal(actual, expected)
    if mode == "xla" and tf.__version__.startswith("2.18."):
        return  # its XLA clips a NaN to a bound
    for i, arrays in enumerate(run.steps(np.nan)):
        np.testing.assert_array_equal(np.isnan(arrays[0]), place(i))


@MODES_XLA_SLOW
def test_clipnorm_spreads_nan_within_its_variable(mode):
    run = Run(tav.AdamW(0.125, clipnorm=0.5, sparse_update="lazy"), mode)
    twin = run.steps(1.0)
    rows = np.zeros(SIZE, bool)
    rows[INDICES[0]] = True  # the slices' norm is that of their rows
    for bad in (np.nan, np.inf):
        for i, (arrays, others) in enumerate(zip(run.steps(bad), twin, strict=True)):
            reached = {KERNEL: np.ones(cases.SHAPES[KERNEL], bool), TABLE: rows}.get(i, place(i))
            if np.isnan(bad):
                np.testing.assert_array_equal(np.isnan(arrays[0]), reached)
            else:  # finite / inf = 0, inf / inf = NaN
                np.testing.assert_array_equal(np.isnan(arrays[0]), place(i))
            for actual, expected in zip(arrays, others, strict=True):
                np.testing.assert_array_equal(actual[~reached], expected[~reached])


@axes.pairwise(case=SOME_CASES, mode=cases.MODES)
def test_global_clipnorm_makes_everything_nan(case, mode):
    run = Run(case.cls(0.125, **case.terms, global_clipnorm=0.5), mode)
    for bad in (np.nan, np.inf):
        assert all(np.all(np.isnan(array)) for arrays in run.steps(bad) for array in arrays)


def test_keras_does_the_same_with_global_clipnorm():
    weights = [tf.Variable([1.0, 2.0]), tf.Variable([3.0])]
    optimizer = keras.optimizers.AdamW(0.125, global_clipnorm=0.5)
    optimizer.apply([tf.constant([np.inf, 1.0]), tf.constant([1.0])], weights)
    assert all(np.all(np.isnan(w)) for w in weights)


# -- whole batches


@ALL_CASES
def test_a_batch_of_nan_is_for_good(case):
    weights = [tf.Variable([1.0, 2.0]), tf.Variable([3.0])]
    optimizer = case.cls(0.125, **case.terms)
    for value in (np.nan, 1.0, 1.0):
        optimizer.apply([tf.fill([2], np.float32(value)), tf.fill([1], np.float32(value))], weights)
    assert all(np.all(np.isnan(w)) for w in weights)
    assert int(optimizer.iterations) == 3


@axes.pairwise(bad=[np.nan, np.inf], mode=cases.MODES)
def test_a_loss_scale_optimizer_skips_the_step(bad, mode):
    """Bit for bit: no weight, no slot and no count of steps changes."""

    def train(batches):
        weights = [tf.Variable([1.0, 2.0]), tf.Variable(np.ones(SIZE, np.float32))]
        inner = tav.LAMB(0.125, sparse_update="lazy")
        outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
        outer.build(weights)

        def apply(gradient, values):
            outer.apply([gradient, tf.IndexedSlices(values, tf.constant([1, 4]), tf.constant(SIZE))], weights)

        step = cases.compiled(mode, inner, apply)
        for value in batches:
            step(4 * tf.constant([value, 1.0]), 4 * tf.constant([[1.0, 2, 3], [1, value, 3]]))
            outer.dynamic_scale.assign(4.0)  # a step that was skipped halves it
        return [v.numpy() for v in (*weights, *inner.variables)]

    for actual, expected in zip(train([1.0, bad, 2.0]), train([1.0, 2.0]), strict=True):
        np.testing.assert_array_equal(actual, expected)


# -- what is too large, too small, or zero


@CASES_AND_MODES
def test_zero_gradients_leave_weights_alone(case, mode):
    """Weights of zero among them, whose trust ratio is 1. Only the decay moves weights."""
    decay = {"weight_decay": 0.0} if case.decays else {}
    inits = [np.array([0.0, 1.0, -2.0]), np.zeros(2)]
    actual = cases.run(
        mode, case.cls(0.125, **case.terms, **decay), inits, [[np.zeros(3), np.zeros(2)]] * 2, paths="ab"
    )
    for step in actual:
        for w, before in zip(step, inits, strict=True):
            np.testing.assert_array_equal(w, before)


@CASES_AND_MODES
def test_without_epsilon_a_gradient_that_was_always_zero_gives_nan(case, mode):
    """0 / 0, as in PyTorch, optax and Keras, and in no other element."""
    decay = {"weight_decay": 0.0} if case.decays else {}
    optimizer = case.cls(0.125, **case.terms, **decay, epsilon=0.0)
    actual = cases.run(mode, optimizer, [np.ones(2)], [[np.array([0.0, 1.0])]] * 2, paths="a")
    for (w,) in actual:
        np.testing.assert_array_equal(np.isnan(w), [True, False])


@axes.pairwise(sparse_update=["exact", "lazy"], mode=cases.MODES)
def test_without_epsilon_lazy_rows_without_a_gradient_stay(sparse_update, mode):
    table = tf.Variable(np.ones((4, 2)))
    step = cases.apply_in(mode, tav.AdamW(0.125, epsilon=0.0, sparse_update=sparse_update), [table])
    step([tf.IndexedSlices(tf.ones((2, 2), tf.float64), tf.constant([1, 3]), tf.constant([4, 2]))])
    np.testing.assert_array_equal(
        np.isnan(table.numpy()).all(1), np.array([1, 0, 1, 0]) * (sparse_update == "exact")
    )


@MODES_XLA_SLOW
def test_a_denormal_gradient_is_as_good_as_zero(mode):
    def train(first):
        grads = [[np.array([first, 1.0])], [np.array([1.0, 1.0])]]
        return cases.run(mode, tav.AdamW(0.125), [np.ones(2)], grads, tf.float32, "a")

    for (actual,), (expected,) in zip(train(1e-40), train(0.0), strict=True):
        np.testing.assert_array_equal(actual, expected)


@MODES_XLA_SLOW
def test_a_denormal_gradient_of_float16_is_a_gradient(mode):
    """float32, the arithmetic's type, has room for it."""
    optimizer = tav.AdamW(0.125, weight_decay=0.0, epsilon=1e-12)
    ((w,),) = cases.run(mode, optimizer, [np.ones(2)], [[np.array([6e-8, 1.0])]], tf.float16, "a")
    np.testing.assert_array_equal(w, [0.875, 0.875])


@MODES_XLA_SLOW
def test_a_gradient_whose_square_overflows(mode):
    """v is infinite, so that the weight stays; at the next step it is NaN, as with Keras's Adam."""
    grads = [[np.array([1e25, 1.0])], [np.array([1.0, 1.0])]]
    optimizer = tav.AdamW(0.125, weight_decay=0.0)
    (first,), (second,) = cases.run(mode, optimizer, [np.ones(2)], grads, tf.float32, "a")
    np.testing.assert_allclose(first, [1.0, 0.875], rtol=1e-6)
    np.testing.assert_allclose(second, [np.nan, 0.75], rtol=1e-6)
