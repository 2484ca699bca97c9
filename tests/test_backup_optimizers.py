"""AtomicBackupAndRestore with the optimizers of a `train_step` of its own, which the first step builds."""

import backed_up
import keras
import numpy as np
import pytest
import tensorflow as tf
from strategies import on_each_device, strategy_of

import tf_adam_variants as tav
from tf_adam_variants.callbacks import backup_folder, model_optimizers

Backup = tav.callbacks.AtomicBackupAndRestore
LossScaleOptimizer, Adam = keras.optimizers.LossScaleOptimizer, keras.optimizers.Adam
DATA = {"x": backed_up.X[:18], "y": backed_up.Y[:18], "epochs": 2}  # three steps in each
ONE_STEP = {"x": backed_up.X[:6], "y": backed_up.Y[:6], "epochs": 1}


def leave_backups(made, folder, save_freq=1, number=1, **data):
    """A training to its end, which leaves its first backups: as one that was killed after them."""
    write = backup_folder.BackupFolder.write
    written = []

    def write_the_first(self, description, arrays):
        if len(written) < number:
            written.append(write(self, description, arrays))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backup_folder.BackupFolder, "remove_all", lambda self: None)
        patch.setattr(backup_folder.BackupFolder, "write", write_the_first)
        backed_up.fit(made, Backup(folder, save_freq), **data or ONE_STEP)


def restore(made, folder):
    """What `fit` does before its first step."""
    backup = Backup(folder)
    backup.set_model(made)
    backup.on_train_begin()
    return made


def assert_is_restored(made, wanted, folder):
    restore(made, folder)
    assert backed_up.same(backed_up.state(made), backed_up.state(wanted))
    have, want = (
        [one.serialize() for one in model_optimizers.layouts(m.optimizers())] for m in (made, wanted)
    )
    assert have == want


def describe(folder, **changes):
    """What the newest backup in a folder says of itself; with changes, it is written again with them."""
    backup = backup_folder.BackupFolder(folder).find_whole()
    if changes:
        with backup.open() as file:
            array = np.frombuffer(file.read(), np.uint8)
        description = {
            key: value for key, value in (backup.description | changes).items() if value is not None
        }
        backup_folder.BackupFolder(folder).write(description, [array])
    return backup.description


# -- going on ------------------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


OPTIMIZERS = {
    "ours": lambda: (tav.LAMB(0.05), tav.QHAdam(0.05)),
    "Keras's and ours": lambda: {"one": {"of": Adam(0.05)}, "other": [tav.AdamW(0.05)]},
    "one is never used": lambda: [tav.AdamW(0.05), tav.AdamW(0.05), tav.AdamW(0.05)],
    "averages and sums": lambda: [
        tav.AdamW(0.05, use_ema=True, amsgrad=True),
        tav.QHAdamW(0.05, gradient_accumulation_steps=2),
    ],
    "Keras's averages and sums": lambda: [
        Adam(0.05, use_ema=True, amsgrad=True),
        keras.optimizers.SGD(0.05, 0.9, gradient_accumulation_steps=2),
    ],
    "loss scale": lambda: [LossScaleOptimizer(tav.LAMB(0.05)), LossScaleOptimizer(Adam(0.05))],
}


@pytest.mark.parametrize(
    ("name", "save_freq"),
    [
        ("ours", 2),
        ("loss scale", "epoch"),
        slow("Keras's and ours", "epoch"),
        slow("averages and sums", 2),
        slow("one is never used", 2),
        slow("Keras's averages and sums", "epoch"),
    ],
)
def test_a_new_process_builds_them_as_the_first_step_did(name, save_freq, tmp_path):
    wanted, other = (backed_up.adversarial(OPTIMIZERS[name], run_eagerly=True) for _ in range(2))
    leave_backups(wanted, tmp_path, save_freq, **DATA)
    backed_up.fit(other, Backup(tmp_path), **DATA)
    assert backed_up.same(backed_up.state(other), backed_up.state(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("save_freq", [1, "epoch"])
def test_a_killed_process(save_freq, tmp_path):
    """In graphs."""
    wanted, other = backed_up.adversarial(), backed_up.adversarial()
    backed_up.fit(wanted)
    arguments = {"calls": 2, "make": backed_up.adversarial, "save_freq": save_freq}
    assert backed_up.run(backed_up.train, tmp_path, **arguments) == -9
    backed_up.fit(other, Backup(tmp_path))
    assert backed_up.same(backed_up.state(other), backed_up.state(wanted))


@pytest.mark.slow
def test_two_replicas(tmp_path):
    """TensorFlow lets no step build an optimizer there: the first program does, the second leaves it."""

    def make(builds):
        with strategy_of("two replicas").scope():
            made = backed_up.adversarial(lambda: [tav.LAMB(0.05), Adam(0.05)])
            made.noise = None  # replicas would write one seed
            made.built = True
            for optimizer, part in zip(made.optimizers(), (made.judges, made.makes), strict=True):
                if builds:
                    optimizer.build(part.trainable_variables[::-1])
        return made

    wanted, other = make(True), make(False)
    leave_backups(wanted, tmp_path, 2, 2, **DATA)
    backed_up.fit(other, Backup(tmp_path), **DATA)
    for made in (wanted, other):
        made.seen = on_each_device(
            [*made.variables, *(v for one in made.optimizers() for v in one.variables)]
        )
    assert len(other.seen) == 2
    assert all(backed_up.same(*pair) for pair in zip(other.seen, wanted.seen, strict=True))


class WithVariables(keras.Model):
    """Two variables of equal shapes and, but for numbers, names, which optimizers train in eager steps."""

    def __init__(self, *optimizers, train=lambda model: model.pair):
        super().__init__()
        self.pair = [
            keras.Variable(value, dtype="float32", name=f"same_{value[0]}") for value in ([1, 2], [3, 4])
        ]
        self.own, self.train = list(optimizers), train
        self.stepped = self.own
        self.compile(run_eagerly=True)

    def optimizers(self):
        return self.own

    def train_step(self, data):
        trained = self.train(self)
        for optimizer in self.stepped:
            gradients = [(i + 1) * tf.reduce_mean(data[0]) * tf.ones(v.shape) for i, v in enumerate(trained)]
            optimizer.apply_gradients(zip(gradients, trained, strict=True))
        return {"loss": 0.0}


def test_variables_that_were_added_later(tmp_path):
    """A call of `build` adds its slots after those of the call before."""

    def make():
        return WithVariables(LossScaleOptimizer(tav.AdamW(0.05, use_ema=True)), tav.AdamW(amsgrad=True))

    wanted = make()
    wanted.train = lambda model: model.pair[1:]
    backed_up.fit(wanted, **ONE_STEP)
    wanted.own[0].inner_optimizer.build(wanted.pair)
    wanted.own[1].build(wanted.pair)
    wanted.train = lambda model: model.pair
    leave_backups(wanted, tmp_path)
    assert describe(tmp_path)["builds"] == [None, [[1], [0]], [[1], [0]]]
    assert_is_restored(make(), wanted, tmp_path)


def test_an_optimizer_that_another_wraps_is_built_by_it(tmp_path):
    def make():
        inner = Adam(0.05)
        made = WithVariables(inner, LossScaleOptimizer(inner))
        made.stepped = made.own[1:]
        return made

    wanted = make()
    leave_backups(wanted, tmp_path)
    assert_is_restored(make(), wanted, tmp_path)


def test_where_optimizers_are_found():
    inner = keras.Sequential([keras.layers.Dense(1)])
    made = keras.Sequential([inner])
    optimizers = [tav.AdamW() for _ in range(4)]
    made.compile(optimizers[0])
    made.of_its_own, made.deep = {"one": optimizers[1]}, [{"more": (optimizers[2], optimizers[1])}]
    made.deep.append(made.deep)
    inner.compile(optimizers[3])
    assert model_optimizers.find(made) == optimizers
    assert model_optimizers.find(made, everywhere=False) == optimizers[:2]


# -- backups of the first format -----------------------------------------------------------------------------


def test_a_backup_of_the_first_format(tmp_path):
    """It has whether the model's optimizer was built; others had to be built here."""
    first = {"format": 1, "built": True, "builds": None, "weights": None}

    def make():
        made = WithVariables(tav.QHAdam())
        made.compile(tav.LAMB(), run_eagerly=True)
        made.stepped = [made.optimizer, *made.own]
        return made

    wanted, other = make(), make()
    leave_backups(wanted, tmp_path)
    describe(tmp_path, **first)
    with pytest.raises(ValueError, match="it has 14 variables, they have 10"):
        restore(other, tmp_path)
    other.own[0].build(other.pair)
    assert_is_restored(other, wanted, tmp_path)
    describe(tmp_path, format=3)
    with pytest.raises(ValueError, match="another version of tf_adam_variants"):
        restore(other, tmp_path)


# -- what cannot be restored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("save_freq", [1, "epoch"])
@pytest.mark.parametrize("variable", [keras.Variable, tf.Variable])
def test_a_variable_that_is_not_the_model_s(variable, save_freq, tmp_path):
    """The first step says so, before anything is written."""
    outside = variable([1.0, 2.0], name="temperature")
    made = WithVariables(tav.LAMB(name="of_its_own"), train=lambda model: [*model.pair, outside])
    with pytest.raises(ValueError, match=r"training of temperature by of_its_own: .*Make its layer"):
        backed_up.fit(made, Backup(tmp_path / "backups", save_freq), **DATA)
    assert not list((tmp_path / "backups").iterdir())
    assert int(made.own[0].iterations) == 1  # not after all steps of the epoch


def test_the_same_variables_in_another_order(tmp_path):
    """Of equal names and shapes: their slots would be taken for one another."""
    leave_backups(WithVariables(tav.LAMB()), tmp_path)
    other = WithVariables(tav.LAMB())
    other.own[0].build(other.pair[::-1])
    with pytest.raises(
        ValueError, match=r"lamb\w* was built on same_1, same_3\. Here: same_3, same_1\. Build"
    ):
        restore(other, tmp_path)
    np.testing.assert_array_equal(other.own[0].variables[2], [0, 0])


def test_other_optimizers(tmp_path):
    leave_backups(WithVariables(tav.LAMB(), tav.LAMB()), tmp_path)
    for others in ([], [tav.LAMB()], [tav.LAMB(), tav.AdamW()]):
        with pytest.raises(
            ValueError, match=r"RMSprop, tf_adam_variants\.LAMB, tf_adam_variants\.LAMB\. Here: "
        ):
            restore(WithVariables(*others), tmp_path)


def test_a_smaller_model(tmp_path):
    """Its first variables are those of the backup; the places of the others are none of it."""
    leave_backups(WithVariables(tav.LAMB()), tmp_path)
    other = WithVariables(tav.LAMB(), train=None)
    del other.pair[1]
    with pytest.raises(ValueError, match="does not belong to this model"):
        restore(other, tmp_path)


def test_a_layer_that_is_not_built(tmp_path):
    """A model without a `call` is never built itself."""
    made = backed_up.adversarial()
    assert not made.built
    restore(made, tmp_path)
    made.judges = keras.layers.Dense(1, name="judge")
    with pytest.raises(ValueError, match=r"judge is not: give it an Input"):
        restore(made, tmp_path)
