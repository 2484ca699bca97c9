"""State while training changes: layers are frozen, thawed and added, state moves between policies."""

import copy
import pickle

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from saved_models import OPTIMIZERS, assert_same, fit, in_turn, model, state
from strategies import strategy_of

import tf_adam_variants as tav

RATE = 0.0625
SOME = ("everything", "LAMB")


def followed(case, inits, grads, trained, starts):
    """The oracle's weights after each step, of which each is for some of the variables.

    starts: after how many steps each variable was added; its own steps count from there.
    """
    terms = dict(case.oracle_kwargs)
    decay = terms.pop("weight_decay", 0.0) * (1.0 if case.cls is tav.LAMB else RATE)
    weights, slots, history = [w.copy() for w in inits], [{} for _ in inits], []
    for step, (step_grads, indices) in enumerate(zip(grads, trained, strict=True)):
        for i in indices:
            t = step + 1 - starts[i]
            weights[i] = case.rule(weights[i], step_grads[i], t, slots[i], RATE, decay, **terms)
        history.append([w.copy() for w in weights])
    return history


def some_slots(optimizer, prefixes):
    """The slots of some variables."""
    return {
        v.name: np.array(v.numpy())
        for v in optimizer.variables
        if v.name.startswith(tuple(p.replace("/", "_") for p in prefixes))
    }


def assert_same_slots(have, want):
    assert have.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(have[name], array, err_msg=name)


@pytest.mark.parametrize(("case", "mode"), in_turn(cases.CASES, ["eager", "graph", "fused graph"]))
def test_variables_are_added_frozen_and_thawed(case, mode):
    phases = [((0, 1), 40), ((0, 1, 2, 3), 3), ((1, 2), 2), ((3, 0), 1), ((0, 1, 2, 3), 2)]
    trained = [indices for indices, steps in phases for _ in range(steps)]
    inits, grads = cases.problem(len(trained))
    want = followed(case, inits, grads, trained, starts=(0, 0, 40, 40))
    decay = {"weight_decay": 0.25} if case.decays else {}
    optimizer = case.cls(RATE, **case.terms, **decay)
    weights = cases.variables(inits, tf.float64)
    history, step = [], 0
    for indices, steps in phases:
        now = [weights[i] for i in indices]
        frozen = [path for i, path in enumerate(cases.PATHS) if i not in indices]
        optimizer.build(now)
        before = some_slots(optimizer, frozen)
        take = cases.apply_in(mode, optimizer, now)
        for _ in range(steps):
            take([tf.constant(grads[step][i]) for i in indices])
            history.append([w.numpy() for w in weights])
            step += 1
        assert_same_slots(some_slots(optimizer, frozen), before)
    assert cases.worst(history, want) < 1e-12


@pytest.mark.parametrize(
    ("mode", "case"), in_turn(cases.MODES, [cases.CASES[0], cases.CASES[5], cases.CASES[6]])
)
def test_state_that_is_assigned_is_taken_up(case, mode):
    """Weights, slots and the number of steps, by `assign` and by `set_weights`, in a traced function."""
    inits, grads = cases.problem(3)
    weights = cases.variables(inits, tf.float64)
    optimizer = case.cls(RATE, **case.terms, **({"weight_decay": 0.25} if case.decays else {}))
    step = cases.apply_in(mode, optimizer, weights)
    step([tf.constant(g) for g in grads[0]])
    terms = dict(case.oracle_kwargs)
    decay = terms.pop("weight_decay", 0.0) * (1.0 if case.cls is tav.LAMB else RATE)
    rng = np.random.default_rng(1)
    for t, way in ((8, "assign"), (20, "set_weights")):
        new = [rng.normal(size=w.shape) for w in inits]
        slots = [{"m": rng.normal(size=w.shape), "v": rng.uniform(0.5, 1, size=w.shape)} for w in inits]
        values = [np.array(t - 1), np.array(RATE), *(array for each in slots for array in each.values())]
        if way == "assign":
            for variable, value in zip(optimizer.variables, values, strict=True):
                variable.assign(value)
        else:
            optimizer.set_weights(values)
        for w, value in zip(weights, new, strict=True):
            w.assign(value)
        for s in range(2):
            new = [
                case.rule(w, g, t + s, kept, RATE, decay, **terms)
                for w, g, kept in zip(new, grads[s], slots, strict=True)
            ]
            step([tf.constant(g) for g in grads[s]])
        assert cases.worst([[w.numpy() for w in weights]], [new]) < 1e-12
        have = [v.numpy() for v in optimizer.variables[2:]]
        assert cases.worst([have], [[each[name] for each in slots for name in "mv"]]) < 1e-12


def test_names_and_order_of_variables_are_keras_s():
    for options in ({}, {"amsgrad": True}, {"use_ema": True, "gradient_accumulation_steps": 2}):
        ours, theirs = (model(cls(RATE, **options)) for cls in (tav.AdamW, keras.optimizers.AdamW))
        for made in (ours, theirs):
            made.optimizer.build(made.trainable_variables)
        assert [v.name for v in ours.optimizer.variables] == [v.name for v in theirs.optimizer.variables]


# -- freezing between two fits -------------------------------------------------------------------------------


def freeze(made, *names):
    """Train the other layers, with the same optimizer."""
    for layer in made.layers:
        layer.trainable = layer.name not in names
    made.compile(made.optimizer, "mse")


@pytest.mark.parametrize("name", SOME)
def test_a_frozen_layer_keeps_weights_and_slots(name):
    made = model(OPTIMIZERS[name]())
    fit(made)
    freeze(made, "body")
    weights, slots = made.layers[0].get_weights(), some_slots(made.optimizer, ["net/body"])
    moments = {key: value for key, value in slots.items() if not key.endswith("average")}
    head = made.layers[1].get_weights()
    fit(made)
    assert_same(made.layers[0].get_weights(), weights)
    now = some_slots(made.optimizer, ["net/body"])
    waiting = "_accumulator"  # of a step that began before: Keras empties all of them at the next update
    assert_same_slots(
        {k: v for k, v in now.items() if k in moments and not k.endswith(waiting)},
        {k: v for k, v in moments.items() if not k.endswith(waiting)},
    )
    assert not np.array_equal(made.layers[1].get_weights()[0], head[0])
    freeze(made)
    fit(made)
    assert not np.array_equal(made.layers[0].get_weights()[0], weights[0])


@pytest.mark.parametrize("frozen", ["body", "head"])
@pytest.mark.parametrize("overwrite", axes.one_quick([None, 2]))
def test_averages_of_a_model_with_a_frozen_layer(frozen, overwrite):
    made = model(tav.AdamW(RATE, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=overwrite))
    fit(made)
    freeze(made, frozen)
    before = made.get_layer(frozen).get_weights()
    fit(made)
    assert_same(made.get_layer(frozen).get_weights(), before)
    averages = [v.numpy() for v in made.optimizer.variables if v.name.endswith("average")]
    for weight, average in zip(made.get_weights(), averages, strict=True):
        np.testing.assert_allclose(weight, average, rtol=1e-6)


def test_without_compile_the_traced_step_stays():
    """As Keras documents it: `trainable` takes effect with `compile`."""
    ours, theirs = (model(cls(RATE)) for cls in (tav.AdamW, keras.optimizers.AdamW))
    for made in (ours, theirs):
        fit(made)
        made.layers[0].trainable = False
        before = made.layers[0].get_weights()[0]
        fit(made)
        assert not np.array_equal(made.layers[0].get_weights()[0], before)


# -- layers that the optimizer was not built on --------------------------------------------------------------


def thawed(name):
    """A model whose body was frozen at first, and whose optimizer then took it."""
    made = model(OPTIMIZERS[name]())
    freeze(made, "body")
    fit(made)
    freeze(made)
    made.optimizer.build(made.trainable_variables)
    fit(made)
    return made


def test_layers_without_slots_are_an_error_that_says_what_helps():
    made = model(tav.QHAdamW(RATE, use_ema=True))
    freeze(made, "body")
    fit(made)
    slots = some_slots(made.optimizer, ["net/head"])
    freeze(made)
    with pytest.raises(ValueError, match=r"Unknown variables: net/body/kernel.*optimizer\.build\("):
        fit(made)
    assert_same_slots(some_slots(made.optimizer, ["net/head"]), slots)
    made.optimizer.build(made.trainable_variables)
    assert_same_slots(some_slots(made.optimizer, ["net/head"]), slots)
    added = some_slots(made.optimizer, ["net/body"])
    assert sorted(added) == [
        f"net_body_{weight}_{slot}"
        for weight in ("bias", "kernel")
        for slot in ("average", "momentum", "velocity")
    ]
    np.testing.assert_array_equal(added["net_body_kernel_average"], made.layers[0].kernel.numpy())
    np.testing.assert_array_equal(added["net_body_kernel_momentum"], 0)
    fit(made)


def test_exclusions_hold_for_added_variables():
    """And no pattern is said to match nothing because it does so among the added ones."""
    kernel, bias = tf.Variable([1.0], name="kernel"), tf.Variable([1.0], name="bias")
    late = tf.Variable([1.0], name="late/bias")
    optimizer = tav.AdamW(0.5, weight_decay=1.0, exclude_from_weight_decay=["bias", "kernel"])
    optimizer.build([kernel, bias])
    optimizer.build([kernel, bias, late])
    optimizer.apply([tf.zeros(1)] * 3, [kernel, bias, late])
    assert [float(v[0]) for v in (kernel, bias, late)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_when_variables_were_added_is_state(mode):
    """One int64 variable per late `build`, which a traced function reads, and `set_weights` sets."""
    inits, grads = cases.problem(9)

    def optimizer_at(*counts):
        """An optimizer with one more variable after each count of updates, and its step on all of them."""
        optimizer, weights = tav.QHAdam(RATE), cases.variables(inits, tf.float64)
        optimizer.build(weights[:1])
        for i, count in enumerate(counts, 2):
            optimizer.iterations.assign(count)
            optimizer.build(weights[:i])
        now = weights[: 1 + len(counts)]
        return optimizer, now, cases.apply_in(mode, optimizer, now)

    def run(step, first, last):
        for g in grads[first:last]:
            step([tf.constant(each) for each in g[:3]])

    def values(optimizer):
        return [v.numpy() for v in optimizer.variables]

    def starts(optimizer):
        return [(v.dtype, int(v.numpy())) for v in optimizer._added_at.variables]

    assert starts(optimizer_at()[0]) == []
    one, weights, step = optimizer_at(3, 5)
    assert starts(one) == [("int64", 3), ("int64", 5)]
    assert "added_at" not in [v.name for v in one.variables]
    run(step, 0, 2)
    other, its_weights, its_step = optimizer_at(1, 4)
    run(its_step, 0, 1)  # and so traced
    store = {}
    for _ in range(2):
        one.save_own_variables(store)
        other.load_own_variables(store)
        assert_same(values(other), values(one))
        assert starts(other) == starts(one)
        for copy_of, weight in zip(its_weights, weights, strict=True):
            copy_of.assign(weight)
        run(step, 2, 4)
        run(its_step, 2, 4)
        assert_same([w.numpy() for w in its_weights], [w.numpy() for w in weights])
    one.iterations.assign(0)  # less than where they were added: they begin there
    run(step, 4, 6)
    assert starts(one) == [("int64", 0), ("int64", 0)]
    assert all(np.all(np.isfinite(w.numpy())) for w in weights)


def test_a_loss_scale_optimizer_keeps_its_state_where_layers_were_added(tmp_path):
    """It saves `variables` by position, so what a later build adds must not be among them but slots."""
    made = model(keras.optimizers.LossScaleOptimizer(tav.AdamW(RATE), initial_scale=64.0))
    freeze(made, "head")
    fit(made, 1)
    freeze(made)
    made.optimizer.inner_optimizer.build(made.trainable_variables)
    fit(made, 1)
    made.optimizer.dynamic_scale.assign(7.0)
    made.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert float(again.optimizer.dynamic_scale.numpy()) == 7.0
    fit(made, 1)
    fit(again, 1)
    assert_same(again.get_weights(), made.get_weights())


def test_variables_that_were_added_by_more_calls_than_here():
    """Loading creates variables for the calls, unless a function that is traced would not read them."""
    inits, grads = cases.problem(3)
    one, weights = tav.AdamW(RATE), cases.variables(inits, tf.float64)
    for end in (2, 3, 4):
        one.build(weights[:end])
        one.iterations.assign_add(7)
    store = {}
    one.save_own_variables(store)
    trained = [(one, weights)]
    for calls in ((4,), (2, 4), (1, 2, 3, 4)):
        twin, its_weights = tav.AdamW(RATE), cases.variables(inits, tf.float64)
        for end in calls:
            twin.build(its_weights[:end])
        twin.load_own_variables(store)
        trained.append((twin, its_weights))
    for optimizer, variables in trained:
        for g in grads:
            optimizer.apply([tf.constant(each) for each in g], variables)
        assert_same([w.numpy() for w in variables], [w.numpy() for w in weights])

    traced, variables = tav.AdamW(RATE), cases.variables(inits, tf.float64)
    traced.build(variables)
    cases.apply_in("graph", traced, variables)([tf.constant(each) for each in grads[0]])
    with pytest.raises(ValueError, match="took variables later than here, and a function"):
        traced.load_own_variables(store)


def test_lora():
    made = model(tav.AdamW(RATE))
    fit(made)
    made.layers[0].enable_lora(2)
    kept = some_slots(made.optimizer, ["net/body", "net/head"])
    anew = tav.AdamW(RATE)
    anew.build(made.trainable_variables)
    assert not some_slots(anew, ["net/body/kernel"])  # slots for what trains
    assert len(some_slots(anew, ["net/body/lora"])) == 4
    made.optimizer.build(made.trainable_variables)
    made.compile(made.optimizer, "mse")
    assert_same_slots({name: some_slots(made.optimizer, ["net"])[name] for name in kept}, kept)
    kernel = made.layers[0]._kernel.numpy()
    fit(made)
    slots = some_slots(made.optimizer, ["net/body/kernel"])
    assert_same_slots(slots, {name: kept[name] for name in slots})
    np.testing.assert_array_equal(made.layers[0]._kernel.numpy(), kernel)
    assert np.any(some_slots(made.optimizer, ["net/body/lora_kernel_b_m"])["net_body_lora_kernel_b_momentum"])


# -- saving in the middle of it ------------------------------------------------------------------------------


def by_file(made, tmp_path):
    made.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


def by_weights(made, tmp_path, built=False):
    made.save_weights(tmp_path / "model.weights.h5")
    other = model(type(made.optimizer).from_config(made.optimizer.get_config()))
    freeze(other, *(layer.name for layer in made.layers if not layer.trainable))
    if built:
        other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    return other


def by_weights_built(made, tmp_path):
    return by_weights(made, tmp_path, built=True)


def values(made):
    """All state, by names that do not depend on the model's."""
    slots = {v.name.removeprefix("net_"): v.numpy() for v in made.optimizer.variables}
    return slots | {str(i): w for i, w in enumerate(made.get_weights())}


@pytest.mark.parametrize(
    ("name", "way"), [("everything", by_file), ("LAMB", by_weights), ("LAMB", by_weights_built)]
)
def test_a_model_with_a_frozen_layer_is_saved_and_thawed_later(name, way, tmp_path):
    made = model(OPTIMIZERS[name]())
    fit(made)
    freeze(made, "body")
    fit(made)
    other = way(made, tmp_path)
    other = way(other, tmp_path)  # what waits for its layer is saved again
    fit(made)
    fit(other)
    assert_same(other.get_weights(), made.get_weights())
    for each in (made, other):
        freeze(each)
        each.optimizer.build(each.trainable_variables)
        fit(each)
    assert_same_slots(values(other), values(made))


@pytest.mark.parametrize(
    ("name", "way"), [("LAMB", by_file), ("everything", by_weights), ("LAMB", by_weights_built)]
)
def test_a_model_whose_layers_were_added_is_saved(name, way, tmp_path):
    """The new optimizer has its slots in another order: they go by names, and the steps count as before."""
    made = thawed(name)
    other = way(made, tmp_path)
    fit(made)
    fit(other)
    assert_same_slots(values(other), values(made))


def test_a_checkpoint_goes_by_position(tmp_path):
    made = thawed("LAMB")
    path = tf.train.Checkpoint(model=made, optimizer=made.optimizer).save(tmp_path / "ckpt")
    for in_order in (True, False):
        other = model(OPTIMIZERS["LAMB"]())
        if in_order:
            other.optimizer.build(other.layers[1].trainable_variables)
        other.optimizer.build(other.trainable_variables)
        checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
        if in_order:
            checkpoint.restore(path).assert_consumed()  # with the saved count, in a `build` at another
            fit(made)
            fit(other)
            assert_same(state(other), state(made))
        else:
            with pytest.raises(ValueError, match=r"another order|does not belong|incompatible"):
                checkpoint.restore(path)


def test_an_option_that_is_missing_is_not_a_frozen_layer(tmp_path):
    made = model(tav.AdamW(RATE, amsgrad=True))
    fit(made)
    made.save_weights(tmp_path / "model.weights.h5")
    other = model(tav.AdamW(RATE))
    freeze(other, "body")
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="does not belong to adamw"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_weights_without_an_optimizer_s_state(tmp_path):
    """Pretrained weights, for one."""
    bare = model(tav.QHAdam(RATE))
    keras.Sequential([keras.Input((3,)), *bare.layers]).save_weights(tmp_path / "bare.weights.h5")
    made = model(tav.QHAdam(RATE))
    with pytest.warns(UserWarning, match="no state for qhadam, which stays as it is"):
        made.load_weights(tmp_path / "bare.weights.h5")
    fit(made)
    fit(bare)
    assert_same(state(made), state(bare))


# -- mixed precision -----------------------------------------------------------------------------------------


def mixed(policy, optimizer, **options):
    keras.config.set_dtype_policy(policy)
    try:
        made = model(optimizer)
        made.compile(optimizer, "mse", **options)
    finally:
        keras.config.set_dtype_policy("float32")
    return made


def inner(made):
    return getattr(made.optimizer, "inner_optimizer", made.optimizer)


@pytest.mark.parametrize(
    ("before", "after"),
    in_turn(["float32", "mixed_float16", "mixed_bfloat16"], ["mixed_float16", "mixed_bfloat16", "float32"]),
)
def test_state_moves_between_policies(before, after, tmp_path):
    made = mixed(before, tav.QHAdamW(RATE))
    fit(made)
    made.save_weights(tmp_path / "model.weights.h5")
    path = tf.train.Checkpoint(optimizer=inner(made)).save(tmp_path / "ckpt")
    want = [v.numpy() for v in inner(made).variables]
    for way, built in (("weights", False), ("weights", True), ("checkpoint", False), ("checkpoint", True)):
        wraps_later = after == "mixed_float16" != before and way == "weights"
        other = mixed(after, tav.QHAdamW(RATE), **({"auto_scale_loss": False} if wraps_later else {}))
        if built:
            other.optimizer.build(other.trainable_variables)
        if way == "weights":
            other.load_weights(tmp_path / "model.weights.h5")
        else:
            tf.train.Checkpoint(optimizer=inner(other)).restore(path)
        if wraps_later:
            other.compile(other.optimizer, "mse")
            assert isinstance(other.optimizer, keras.optimizers.LossScaleOptimizer)
        inner(other).build(other.trainable_variables)
        assert_same([v.numpy() for v in inner(other).variables], want)
    fit(other, 1)
    assert int(inner(other).iterations) > int(want[0])


def test_a_loss_scale_that_was_not_saved_is_said(tmp_path):
    made = mixed("float32", tav.QHAdamW(RATE))
    fit(made)
    made.save_weights(tmp_path / "model.weights.h5")
    other = mixed("mixed_float16", tav.QHAdamW(RATE))
    with pytest.warns(UserWarning, match="auto_scale_loss=False"):
        other.load_weights(tmp_path / "model.weights.h5")


# -- strategies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["strategy", "one device"])
def test_layers_are_added_under_a_strategy_and_without(first, tmp_path):
    """And saved in one and loaded in the other, and back."""
    strategy = strategy_of("two replicas")
    scopes = [strategy.scope, tf.distribute.get_strategy().scope]
    here, there = scopes if first == "strategy" else scopes[::-1]
    with here():
        made = model(tav.LAMB(RATE, use_ema=True))
        freeze(made, "body")
        fit(made)
        freeze(made)
        made.optimizer.build(made.trainable_variables)
        made.compile(made.optimizer, "mse")
        fit(made)
    made.save_weights(tmp_path / "model.weights.h5")
    with there():
        other = model(tav.LAMB(RATE, use_ema=True))
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "model.weights.h5")
    assert_same_slots(values(other), values(made))
    fit(other)
    other.save_weights(tmp_path / "model.weights.h5")
    with here():
        made.load_weights(tmp_path / "model.weights.h5")
    assert_same_slots(values(other), values(made))
    fit(made)
    assert made.optimizer.iterations.numpy() == 4 * 14


# -- copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on(copied):
    made = model(tav.LAMB(RATE, use_ema=True))
    fit(made)
    whole = copied(made)
    other = model(copied(made.optimizer))  # an optimizer's copy takes its state up when it is built
    other.set_weights(made.get_weights())
    for each in (made, whole, other):
        fit(each)
    assert_same(state(whole), state(made))
    assert_same(state(other), state(made))


def test_a_clone_begins_anew():
    made = model(tav.QHAdamW(RATE))
    fit(made)
    clone = keras.models.clone_model(made)
    clone.compile(tav.QHAdamW.from_config(made.optimizer.get_config()), "mse")
    clone.set_weights(made.get_weights())
    before = [v.numpy() for v in made.optimizer.variables]
    fit(clone)
    assert int(clone.optimizer.iterations) == 14
    assert_same([v.numpy() for v in made.optimizer.variables], before)


def two_towers(wide):
    """Sequential models within a model: their names begin the paths, but not after the model was loaded."""
    towers = [
        keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name=name)], name=f"tower_{name}")
        for name in "ab"
    ]
    inputs = keras.Input((8,))
    product = towers[0](inputs) * towers[1](inputs)
    return keras.Model(inputs, keras.layers.Dense(wide, name="head")(product)), towers[0]


def train(made, epochs=1):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)), rng.normal(size=(32, made.output_shape[-1]))
    made.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def compiled(made, optimizer):
    made.compile(optimizer, "mse")
    return made


def check_goes_on(made, tmp_path):
    """What is loaded trains on with the same bits."""
    made.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    train(made)
    train(again)
    for have, want in zip(again.get_weights(), made.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("counted", [True, False], ids=["after steps", "before the first step"])
@pytest.mark.parametrize("wide", axes.one_quick([1, 8]))
def test_a_tower_that_was_thawed_is_saved(wide, counted, tmp_path):
    made, tower = two_towers(wide)
    tower.trainable = False
    compiled(made, tav.AdamW(RATE))
    made.optimizer.build(made.trainable_variables)
    if counted:
        train(made)
    tower.trainable = True
    made.optimizer.build(made.trainable_variables)
    train(compiled(made, made.optimizer))
    check_goes_on(made, tmp_path)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
def test_the_state_of_a_frozen_tower_waits_for_it(options, tmp_path):
    made, tower = two_towers(8)
    train(compiled(made, tav.AdamW(RATE, **options)))
    tower.trainable = False
    train(compiled(made, made.optimizer))
    made.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for one in (made, again):
        for layer in (one.layers[1], *one.layers[1].layers):
            layer.trainable = True
        one.optimizer.build(one.trainable_variables)
        train(compiled(one, one.optimizer))
    for have, want in zip(again.get_weights(), made.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)
    again.save(tmp_path / "again.keras")  # in this order, and what was added last
    train(again)
    once_more = keras.models.load_model(tmp_path / "again.keras")
    train(once_more)
    for have, want in zip(once_more.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)


def test_a_sequential_of_another_number_takes_the_slots_of_its_layers(tmp_path):
    """Layers of one shape, of which the first was added last."""

    def sequential():
        return keras.Sequential(
            [keras.Input((8,)), *(keras.layers.Dense(8, name=name) for name in ("body", "mid", "head"))]
        )

    made, again = sequential(), sequential()
    made.layers[0].trainable = False
    train(compiled(made, tav.AdamW(RATE)))
    made.layers[0].trainable = True
    made.optimizer.build(made.trainable_variables)
    train(compiled(made, made.optimizer))
    made.save_weights(tmp_path / "model.weights.h5")
    compiled(again, tav.AdamW(RATE))
    again.load_weights(tmp_path / "model.weights.h5")
    train(made)
    train(again)
    for have, want in zip(again.get_weights(), made.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)


def test_listed_exclusions_hold_in_a_model_that_was_loaded(tmp_path):
    made = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(1, name="b")]
    )
    optimizer = tav.AdamW(RATE, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[made.layers[0].kernel])
    train(compiled(made, optimizer))
    check_goes_on(made, tmp_path)
