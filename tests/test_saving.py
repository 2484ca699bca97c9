"""Training that is saved, loaded in a new process and goes on, bit for bit as if never interrupted."""

import axes
import cases
import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from saved_models import (
    LAYOUTS,
    OPTIMIZERS,
    X,
    Y,
    assert_same,
    by_layout,
    fit,
    in_turn,
    model,
    run_in_a_new_process,
    schedule,
    state,
)

import tf_adam_variants as tav

GO_ON = """
import keras, numpy as np, tf_adam_variants
import saved_models as t
for folder in sys.argv[1:]:
    made = keras.models.load_model(folder + "/model.keras")
    t.fit(made)
    np.savez(folder + "/after.npz", *t.state(made))
"""


@pytest.mark.parametrize("names", axes.one_quick([list(OPTIMIZERS), LAYOUTS[:1]]), ids=["all", "one"])
def test_a_keras_file_in_a_new_process(names, tmp_path):
    want = {}
    for i, name in enumerate(names):
        optimizer = OPTIMIZERS[name]()
        if optimizer.weight_decay:
            optimizer.exclude_from_weight_decay(var_names=["body/bias$"])
        made = model(optimizer)
        fit(made)
        folder = tmp_path / str(i)
        folder.mkdir()
        made.save(folder / "model.keras")
        fit(made)
        want[folder] = state(made)
    run_in_a_new_process(GO_ON, *want)
    for folder, arrays in want.items():
        with np.load(folder / "after.npz") as after:
            assert_same(list(after.values()), arrays)


def test_training_on_is_not_training_anew():
    """The test above can fail: without the optimizer's state the weights come out differently."""
    made, other = model(tav.QHAdamW(0.0625)), model(tav.QHAdamW(0.0625))
    fit(made)
    other.set_weights(made.get_weights())
    fit(made)
    fit(other)
    assert not np.array_equal(made.get_weights()[0], other.get_weights()[0])


@pytest.mark.parametrize(("name", "built"), by_layout())
def test_weights_only(name, built, tmp_path):
    made = model(OPTIMIZERS[name]())
    fit(made)
    made.save_weights(tmp_path / "model.weights.h5")
    other = model(OPTIMIZERS[name]())
    if built:
        other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    fit(made)
    fit(other)
    assert_same(state(other), state(made))


@pytest.mark.parametrize(("name", "built"), by_layout())
def test_a_tensorflow_checkpoint(name, built, tmp_path):
    made = model(OPTIMIZERS[name]())
    fit(made)
    path = tf.train.Checkpoint(model=made, optimizer=made.optimizer).save(tmp_path / "ckpt")
    other = model(OPTIMIZERS[name]())
    if built:
        other.optimizer.build(other.trainable_variables)
    status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    fit(made)
    fit(other)
    status.assert_consumed()
    assert_same(state(other), state(made))


def test_half_precision_state(tmp_path):
    weights, other = tf.Variable(tf.ones(3, tf.bfloat16)), tf.Variable(tf.ones(3, tf.bfloat16))
    gradient = tf.constant([1.0, -2.0, 3.0], tf.bfloat16)
    optimizer, twin = tav.QHAdam(0.125), tav.QHAdam(0.125)
    optimizer.apply([gradient], [weights])
    path = tf.train.Checkpoint(w=weights, optimizer=optimizer).save(tmp_path / "ckpt")
    tf.train.Checkpoint(w=other, optimizer=twin).restore(path)
    optimizer.apply([gradient], [weights])
    twin.apply([gradient], [other])
    assert_same([v.numpy() for v in twin.variables], [v.numpy() for v in optimizer.variables])
    assert_same([other.numpy()], [weights.numpy()])


@pytest.mark.parametrize("keras_cls", axes.one_quick([keras.optimizers.Adam, keras.optimizers.AdamW]))
@pytest.mark.parametrize(("amsgrad", "built"), in_turn([False, True], [True, False]))
def test_a_checkpoint_that_keras_wrote(keras_cls, amsgrad, built, tmp_path):
    made = model(keras_cls(0.0625, amsgrad=amsgrad))
    fit(made)
    path = tf.train.Checkpoint(model=made, optimizer=made.optimizer).save(tmp_path / "ckpt")
    made.save_weights(tmp_path / "model.weights.h5")

    def restore_checkpoint(other):
        return tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)

    def load_weights(other):
        other.load_weights(tmp_path / "model.weights.h5")

    for restore in (restore_checkpoint, load_weights):
        other = model(tav.AdamW(0.0625, weight_decay=0.0, amsgrad=amsgrad))
        if built:
            other.optimizer.build(other.trainable_variables)
        status = restore(other)
        other.optimizer.build(other.trainable_variables)
        if status is not None:
            status.assert_existing_objects_matched()
        assert_same(state(other), state(made))
        before = other.evaluate(X, Y, verbose=0)
        fit(other)
        assert other.evaluate(X, Y, verbose=0) < before


DIFFERENT = {
    "amsgrad": {"amsgrad": True},
    "average": {"use_ema": True},
    "gradient_accumulator": {"gradient_accumulation_steps": 2},
    "saved learning_rate": {"learning_rate": schedule},
}


@pytest.mark.parametrize(("what", "built"), in_turn(DIFFERENT, [True, False], every=["amsgrad"]))
def test_other_slots_are_an_error(what, built, tmp_path):
    made = model(tav.AdamW())
    fit(made, 1)
    made.save_weights(tmp_path / "model.weights.h5")
    path = tf.train.Checkpoint(model=made, optimizer=made.optimizer).save(tmp_path / "ckpt")

    def restore_checkpoint(other):
        tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)

    def load_weights(other):
        other.load_weights(tmp_path / "model.weights.h5")

    def load_and_fit(other, restore):
        if built:
            other.optimizer.build(other.trainable_variables)
        restore(other)
        fit(other, 1)

    message = f"(?s)saved.*{'velocity_hat' if what == 'amsgrad' else what}"
    for restore in (restore_checkpoint, load_weights):
        other = model(tav.AdamW(**DIFFERENT[what]))
        with pytest.raises(ValueError, match=message):
            load_and_fit(other, restore)
        if not built and restore is restore_checkpoint:
            before = other.get_weights()
            with pytest.raises(ValueError, match=message):  # and again: it never trains on
                other.optimizer.apply(other.trainable_variables)
            assert_same(other.get_weights(), before)


def test_equal_shapes_do_not_hide_other_slots(tmp_path):
    """An average for each weight is not a largest velocity for each weight."""
    made = model(tav.AdamW(use_ema=True))
    fit(made, 1)
    made.save_weights(tmp_path / "model.weights.h5")
    other = model(tav.AdamW(amsgrad=True))
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="saved average"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_another_model_s_state_is_an_error(tmp_path):
    weights, other = tf.Variable([1.0, 2.0], name="w"), tf.Variable([[1.0]], name="w")
    optimizer, twin = tav.LAMB(), tav.LAMB()
    optimizer.apply([tf.ones(2)], [weights])
    twin.build([other])
    store = {}
    optimizer.save_own_variables(store)
    with pytest.raises(ValueError, match=r"saved momentum \(2,\).*this optimizer has momentum \(1, 1\)"):
        twin.load_own_variables(store)
    assert int(twin.iterations) == 0


class Trainer(tf.Module):
    """A training step as a signature."""

    def __init__(self, optimizer):
        super().__init__()
        self.weights = tf.Variable(np.ones((3, 2), "float32"), name="weights")
        self.optimizer = optimizer
        self.optimizer.build([self.weights])

    @tf.function(input_signature=[tf.TensorSpec((None, 3)), tf.TensorSpec((None, 2))])
    def train(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((x @ self.weights - y) ** 2)
        self.optimizer.apply(tape.gradient(loss, [self.weights]), [self.weights])
        return {"loss": loss}


TRAIN_ON = """
import numpy as np, tensorflow as tf
data = np.load(sys.argv[1])
for folder in sys.argv[2:]:
    module = tf.saved_model.load(folder)
    step = module.signatures["serving_default"]
    losses = [step(x=tf.constant(data["x"]), y=tf.constant(data["y"]))["loss"].numpy() for _ in range(5)]
    np.savez(folder + "/after.npz", losses=losses, weights=module.weights.numpy())
assert "tf_adam_variants" not in sys.modules
"""


@pytest.mark.slow
def test_a_saved_model_trains_on_without_this_package(tmp_path):
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    want = {}
    for i, case in enumerate(cases.CASES):
        trainer = Trainer(case.cls(0.0625, **case.terms, fused=False))  # else it needs the compiled op
        for _ in range(3):
            trainer.train(X, Y)
        folder = tmp_path / str(i)
        tf.saved_model.save(trainer, folder, signatures=trainer.train)
        want[folder] = [trainer.train(X, Y)["loss"].numpy() for _ in range(5)], trainer.weights.numpy()
    run_in_a_new_process(TRAIN_ON, tmp_path / "data.npz", *want)
    for folder, (losses, weights) in want.items():
        with np.load(folder / "after.npz") as after:
            assert_same([after["losses"], after["weights"]], [np.array(losses), weights])


def test_a_saved_model_holds_all_that_its_step_reads(tmp_path):
    """Slots that were added too."""
    trainer = Trainer(tav.LAMB(0.0625, fused=False))
    trainer.optimizer.iterations.assign(3)
    trainer.more = tf.Variable(np.ones((3, 2), "float32"), name="more")
    trainer.optimizer.build([trainer.weights, trainer.more])

    @tf.function(input_signature=[tf.TensorSpec((3, 2))])
    def step(gradient):
        trainer.optimizer.apply([gradient] * 2, [trainer.weights, trainer.more])

    trainer.step = step
    trainer.step(X[:3, :2])
    tf.saved_model.save(trainer, tmp_path / "saved")
    again = tf.saved_model.load(tmp_path / "saved")
    for each in (trainer, again):
        each.step(X[3:6, :2])
    assert_same([again.weights, again.more], [trainer.weights, trainer.more])


@pytest.mark.parametrize("name", axes.one_quick(["qhadam", "qhadamw", "lamb", "tf_adam_variants>AdamW"]))
def test_export(name, tmp_path):
    made = model(name)
    fit(made)
    made.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(X), made.predict(X, verbose=0), rtol=1e-6)


@pytest.mark.parametrize("name", axes.one_quick(["qhadam", "qhadamw", "tf_adam_variants>AdamW", "lamb"]))
def test_saved_before_the_first_step(name, tmp_path):
    made = model(name)
    made.optimizer.learning_rate = 0.5
    made.save(tmp_path / "model.keras")
    made.save_weights(tmp_path / "model.weights.h5")
    loaded, other = keras.models.load_model(tmp_path / "model.keras"), model(name)
    other.load_weights(tmp_path / "model.weights.h5")
    for each in (made, loaded, other):
        fit(each)
    assert_same(state(loaded), state(made))
    assert_same(state(other), state(made))


def test_state_that_waits_is_saved_again(tmp_path):
    made, second, third = (model("qhadamw") for _ in range(3))
    fit(made)
    made.save_weights(tmp_path / "1.weights.h5")
    second.load_weights(tmp_path / "1.weights.h5")
    assert int(second.optimizer.iterations) == 14
    second.save_weights(tmp_path / "2.weights.h5")
    third.load_weights(tmp_path / "2.weights.h5")
    second.optimizer.learning_rate = 0.25  # after loading, and so it stays
    fit(made)
    fit(second)
    fit(third)
    assert_same(state(third), state(made))
    assert float(second.optimizer.learning_rate) == 0.25


@pytest.mark.parametrize("what", DIFFERENT)
def test_other_slots_in_a_checkpoint_that_keras_wrote(what, tmp_path):
    """Without a layout, and restored before the slots are there."""
    made = model(keras.optimizers.AdamW())
    fit(made, 1)
    path = tf.train.Checkpoint(model=made, optimizer=made.optimizer).save(tmp_path / "ckpt")
    other = model(tav.AdamW(**DIFFERENT[what]))
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    with pytest.raises(ValueError, match="no fitting value for net_body"):
        fit(other, 1)


def in_another_order(names):
    """An optimizer that is given the state of one that was built on the variables of these names reversed."""
    variables = [tf.Variable([1.0, 2.0], name=name) for name in names]
    optimizer, twin = tav.QHAdam(), tav.QHAdam()
    optimizer.build(variables)
    twin.build(variables[::-1])
    optimizer.apply([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], variables)
    store = {}
    optimizer.save_own_variables(store)
    twin.load_own_variables(store)
    return optimizer, twin


def test_the_same_variables_in_another_order():
    optimizer, twin = in_another_order(["one", "two"])
    want = {v.name: v.numpy() for v in optimizer.variables}
    assert [v.name for v in twin.variables] != list(want)
    for variable in twin.variables:
        np.testing.assert_array_equal(variable.numpy(), want[variable.name])


def test_the_same_numbered_variables_in_another_order_are_an_error():
    """In another program dense_1 may be the layer that is dense here."""
    with pytest.raises(ValueError, match="another order"):
        in_another_order(["dense/kernel", "dense_1/kernel"])


def flip_a_bit(path, which):
    with h5py.File(path, "r+") as file:
        array = file["optimizer/vars"][which][()]
        array = np.frombuffer(bytes([array.tobytes()[0] ^ 1]) + array.tobytes()[1:], array.dtype)
        file["optimizer/vars"][which][()] = array.reshape(file["optimizer/vars"][which].shape)


@pytest.mark.parametrize("built", [True, False], ids=["built", "built later"])
def test_damaged_state_is_an_error(built, tmp_path):
    made, other = model(tav.LAMB(0.0625)), model(tav.LAMB(0.0625))
    made.optimizer.build(made.trainable_variables)
    path = tmp_path / "model.weights.h5"
    made.save_weights(path)
    if built:
        other.optimizer.build(other.trainable_variables)
    before = [v.numpy() for v in other.optimizer.variables]
    for which in ("0", "3", "layout", "sha256"):
        flip_a_bit(path, which)
        with pytest.raises(ValueError, match="saved state of lamb is damaged"):
            other.load_weights(path)
        assert_same([v.numpy() for v in other.optimizer.variables], before)
        flip_a_bit(path, which)
    other.load_weights(path)


def test_state_that_was_saved_without_a_digest(tmp_path):
    made, other = model(tav.LAMB(0.0625)), model(tav.LAMB(0.0625))
    fit(made)
    path = tmp_path / "model.weights.h5"
    made.save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["optimizer/vars/sha256"]
    other.load_weights(path)
    fit(made)
    fit(other)
    assert_same(state(other), state(made))
