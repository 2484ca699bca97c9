"""AtomicBackupAndRestore: what is interrupted and resumed ends with the same bits, whatever the fault was."""

import errno
import functools
import os
import shutil
import subprocess

import backed_up
import keras
import numpy as np
import pytest
import tensorflow as tf
from strategies import on_each_device, strategy_of

import tf_adam_variants as tav
from tf_adam_variants.callbacks import backup_folder

Backup = tav.callbacks.AtomicBackupAndRestore
FILES = (backup_folder.ARRAYS, backup_folder.DESCRIPTION, backup_folder.DIGESTS)


class Interrupt(keras.callbacks.Callback):
    """An exception after some steps of `fit`."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise InterruptedError  # before the step is backed up


def interrupted(made, folder, after, save_freq="epoch", **options):
    with pytest.raises(InterruptedError):
        backed_up.fit(made, Interrupt(after), Backup(folder, save_freq), **options)


def write_until(step):
    """`BackupFolder.write`, but not after this step: as in a training that was killed."""
    write = backup_folder.BackupFolder.write

    def until(self, description, arrays):
        if description["epoch"] * backed_up.STEPS + description["step"] <= step:
            write(self, description, arrays)

    return until


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def net():
    """A model that is traced once, with its state before training and after it, and the history."""
    made = backed_up.model()
    made.optimizer.build(made.trainable_variables)
    made.before = backed_up.state(made)
    made.history_wanted = backed_up.fit(made)
    made.after = backed_up.state(made)
    return made


def reset(net):
    for variable, value in zip([*net.variables, *net.optimizer.variables], net.before, strict=True):
        variable.assign(value)
    return net


def assert_ends_as_uninterrupted(net, folder, save_freq="epoch"):
    backed_up.fit(reset(net), Backup(folder, save_freq))
    assert backed_up.same(backed_up.state(net), net.after)


# -- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"backup_dir": ""},
        {"backup_dir": None},
        {"backup_dir": "gs://bucket/backups"},
        {"backup_dir": "a\0b"},
        {"save_freq": 0},
        {"save_freq": False},
        {"save_freq": 1.5},
        {"save_freq": "batch"},
        {"delete_checkpoint": "yes"},
    ],
    ids=str,
)
def test_wrong_arguments(wrong, tmp_path):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        Backup(**{"backup_dir": tmp_path} | wrong)


def test_a_model_that_is_not_built(tmp_path):
    made = keras.Sequential([keras.layers.Dense(1)])
    made.compile("lamb", "mse")
    with pytest.raises(ValueError, match="built before `fit`"):
        backed_up.fit(made, Backup(tmp_path))


@pytest.fixture
def tiny():
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])


def begin(made, folder):
    """What `fit` does before its first step."""
    backup = Backup(folder)
    backup.set_model(made)
    backup.on_train_begin()


@pytest.mark.parametrize("name", ["file", "file/below/it", "link", "dangling"])
def test_a_file_where_a_folder_is_to_be(name, tiny, tmp_path):
    """In `fit`, before its first step: until then it may be moved away."""
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    in_the_way = tmp_path / name.partition("/")[0]
    message = (
        rf"`backup_dir` must be a local folder.*{in_the_way} is no folder: .*Received: backup_dir=.*{name}"
    )
    with pytest.raises(ValueError, match=message):
        begin(tiny, tmp_path / name)
    assert file.read_text() == "mine"
    file.unlink()
    in_the_way.unlink(missing_ok=True)
    begin(tiny, tmp_path / name)
    assert names(tmp_path / name) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_cannot_be_written(exists, tiny, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = tmp_path if exists else tmp_path / "new"
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        PermissionError, match=rf"`backup_dir`: Permission denied.*backup_dir=.*{folder}.*Take"
    ):
        begin(tiny, folder)
    with pytest.raises(PermissionError, match="Make it a folder that can be written and start"):
        backup_folder.BackupFolder(folder).write({}, [])


# -- going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "save_freq", ["epoch", 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 7))]
)
def test_resumes_bit_exact(net, save_freq, tmp_path, capsys):
    for after in (1, 6, 8, 15):
        folder = tmp_path / str(after)
        interrupted(reset(net), folder, after, save_freq)
        whole_epochs = (after - 1) // 7 * 7  # the exception came before the backup of the last step
        done = whole_epochs if save_freq == "epoch" else (after - 1) // save_freq * save_freq
        history = backed_up.fit(reset(net), Backup(folder, save_freq))
        assert backed_up.same(backed_up.state(net), net.after)
        message = capsys.readouterr().out
        if done:
            left = (done - 1) if save_freq != "epoch" and done % 7 == 0 else done  # before the epoch's end
            steps = done - left // 7 * 7
            assert f"goes on from {folder}/backup-" in message
            assert f"after {left // 7} epochs and {steps} steps\n" in message
            for name, values in net.history_wanted.items():  # those of the epoch that was interrupted too
                assert history[name] == values[left // 7 :]
        else:
            assert "goes on" not in message
        assert not folder.exists()


def test_without_the_callback_it_would_not(net, tmp_path):
    """The test above can fail: twice the same steps are another training."""
    interrupted(reset(net), tmp_path, 6)
    backed_up.fit(net)
    assert not backed_up.same(backed_up.state(net), net.after)


@pytest.mark.parametrize(
    "make",
    [
        lambda: backed_up.model(lambda: tav.LAMB(0.05), steps_per_execution=3),
        pytest.param(
            lambda: backed_up.model(
                lambda: keras.optimizers.LossScaleOptimizer(tav.AdamW(0.05, amsgrad=True))
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: backed_up.model(lambda: tav.QHAdam(0.05, use_ema=True, gradient_accumulation_steps=2)),
            marks=pytest.mark.slow,
        ),
        lambda: backed_up.model(lambda: keras.optimizers.Adam(0.05), run_eagerly=True),
    ],
    ids=["steps_per_execution", "loss scale", "everything", "Keras, eagerly"],
)
def test_new_models(make, tmp_path):
    wanted = make()
    history = backed_up.fit(wanted)
    made = make()
    interrupted(made, tmp_path, 3 if made.steps_per_execution > 1 else 5, save_freq=2)
    other = make()
    again = backed_up.fit(other, Backup(tmp_path))
    assert backed_up.same(backed_up.state(other), backed_up.state(wanted))
    if not other.run_eagerly:  # where metrics have no variables yet when they could be restored
        assert again == history


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types(dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    try:
        wanted, made, other = (backed_up.model() for _ in range(3))
    finally:
        keras.config.set_dtype_policy("float32")
    backed_up.fit(wanted)
    interrupted(made, tmp_path, 4, save_freq=1)
    backed_up.fit(other, Backup(tmp_path))
    assert backed_up.same(backed_up.state(other), backed_up.state(wanted))


def by_epoch(net):
    """Batches in another order in each epoch, which the optimizer's steps tell."""

    def batches():
        epoch = int(net.optimizer.iterations) // backed_up.STEPS
        order = np.random.default_rng(epoch).permutation(len(backed_up.X))
        for i in range(0, len(order), 6):
            yield backed_up.X[order[i : i + 6]], backed_up.Y[order[i : i + 6]]

    specs = tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1))
    return {
        "x": tf.data.Dataset.from_generator(batches, output_signature=specs),
        "y": None,
        "batch_size": None,
    }


@pytest.mark.slow
def test_an_order_that_depends_on_the_epoch(net, tmp_path):
    backed_up.fit(reset(net), **by_epoch(net))
    wanted = backed_up.state(net)
    assert not backed_up.same(wanted, net.after)
    interrupted(reset(net), tmp_path, 10, 2, **by_epoch(net))
    backed_up.fit(reset(net), Backup(tmp_path), **by_epoch(net))
    assert backed_up.same(backed_up.state(net), wanted)


class WithTwoOptimizers(keras.Model):
    """As an adversarial network, with a `train_step` of its own."""

    def __init__(self):
        super().__init__()
        self.parts = [keras.layers.Dense(1), keras.layers.Dense(1)]
        self.optimizers = {"one": tav.QHAdam(0.05), "other": tav.LAMB(0.05)}
        for part, optimizer in zip(self.parts, self.optimizers.values(), strict=True):
            part.build((None, 3))
            optimizer.build(part.trainable_variables)
        self.build((None, 3))

    def call(self, x):
        return self.parts[0](x) + self.parts[1](x)

    def train_step(self, data):
        x, y = data
        for part, optimizer in zip(self.parts, self.optimizers.values(), strict=True):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        return {"loss": loss}


def test_optimizers_that_are_attributes_of_the_model(tmp_path):
    def make():
        keras.utils.set_random_seed(1)
        made = WithTwoOptimizers()
        made.compile()
        return made

    def state(made):
        return [v.numpy() for v in [*made.variables, *made.optimizers["one"].variables]]

    wanted, made, other = make(), make(), make()
    backed_up.fit(wanted)
    interrupted(made, tmp_path, 5, save_freq=2)
    backed_up.fit(other, Backup(tmp_path))
    assert backed_up.same(state(other), state(wanted))


@pytest.mark.slow
def test_two_replicas(tmp_path):
    with strategy_of("two replicas").scope():
        wanted, other = (backed_up.model(lambda: tav.LAMB(0.05)) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:  # a training that leaves the backup of its tenth step
        patch.setattr(backup_folder.BackupFolder, "remove_all", lambda self: None)
        patch.setattr(backup_folder.BackupFolder, "write", write_until(10))
        history = backed_up.fit(wanted, Backup(tmp_path, save_freq=2))
    again = backed_up.fit(other, Backup(tmp_path))
    have, want = (on_each_device([*one.variables, *one.optimizer.variables]) for one in (other, wanted))
    assert len(have) == 2
    assert all(backed_up.same(*pair) for pair in zip(have, want, strict=True))
    assert again == {name: values[1:] for name, values in history.items()}


def test_the_next_fit_begins_at_its_own_beginning(net, tmp_path):
    interrupted(reset(net), tmp_path, 15)
    assert len(backed_up.fit(net, Backup(tmp_path))["loss"]) == 1
    assert len(backed_up.fit(net)["loss"]) == backed_up.EPOCHS  # Keras's would go on at the third epoch


def test_a_training_that_is_done_stays_done(net, tmp_path):
    for _ in range(2):
        backed_up.fit(reset(net), Backup(tmp_path, delete_checkpoint=False))
        assert backed_up.same(backed_up.state(net), net.after)
        assert names(tmp_path) == ["backup-00000002", "backup-00000003"]


def test_only_backups_are_removed(net, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    backed_up.fit(reset(net), Backup(tmp_path))
    assert names(tmp_path) == ["notes.txt"]


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: backed_up.model(width=5),
            r"kernel \(3, 4\) float32 in the backup and kernel \(3, 5\) float32",
        ),
        (
            lambda: backed_up.model(lambda: tav.QHAdamW(0.05, gradient_accumulation_steps=2)),
            "23 variables, they have 29",
        ),
        (lambda: backed_up.model(lambda: tav.QHAdamW(0.05, use_ema=True)), "they have 29"),
    ],
    ids=["shapes", "slots", "average"],
)
def test_another_model_s_backup(net, other, message, tmp_path):
    interrupted(reset(net), tmp_path, 8)
    made = other()
    before = backed_up.state(made)[:5]
    with pytest.raises(ValueError, match=message):
        backed_up.fit(made, Backup(tmp_path))
    assert backed_up.same(backed_up.state(made)[:5], before)


def test_a_backup_of_keras_s_callback(net, tmp_path):
    with pytest.raises(InterruptedError):
        backed_up.fit(reset(net), keras.callbacks.BackupAndRestore(tmp_path), Interrupt(8))
    with pytest.raises(ValueError, match=r"holds a backup of keras\.callbacks\.BackupAndRestore"):
        backed_up.fit(net, Backup(tmp_path))


def test_data_that_end_before_the_step_of_the_backup(net, tmp_path):
    interrupted(reset(net), tmp_path, 6, save_freq=1)
    with pytest.raises(ValueError, match="made after 5 steps of an epoch, and they end after 2"):
        backed_up.fit(reset(net), Backup(tmp_path), x=backed_up.X[:12], y=backed_up.Y[:12])


# -- damage --------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    **{f"a bit of {name}": lambda folder, name=name: flip(folder / name) for name in FILES},
    **{f"{name} is missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    "cut off": lambda folder: os.truncate(folder / backup_folder.ARRAYS, 100),
    "empty": lambda folder: [(folder / name).write_bytes(b"") for name in FILES],
}


ONE_DAMAGE_QUICK = [
    name if name == "cut off" else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGE
]


@pytest.mark.parametrize("damage", ONE_DAMAGE_QUICK)
def test_the_one_before_a_damaged_backup(net, damage, tmp_path, capsys):
    interrupted(reset(net), tmp_path, 6, save_freq=2)
    newest, before = tmp_path / "backup-00000002", tmp_path / "backup-00000001"
    assert names(tmp_path) == [before.name, newest.name]
    DAMAGE[damage](newest)
    interrupted(reset(net), tmp_path, 5, save_freq=2)
    message = capsys.readouterr().out
    assert (
        f"goes on from {before}, after 0 epochs and 2 steps. Passed over as damaged: {newest.name}" in message
    )
    assert names(tmp_path) == [before.name, "backup-00000003"]  # of two that are kept none is damaged
    assert_ends_as_uninterrupted(net, tmp_path)


def test_all_are_damaged(net, tmp_path):
    interrupted(reset(net), tmp_path, 6, save_freq=2)
    for path in tmp_path.iterdir():
        flip(path / backup_folder.ARRAYS)
    before = backed_up.state(net)
    with pytest.raises(
        OSError, match=rf"backups in {tmp_path}, and all of them are damaged.*Bring the folder"
    ):
        backed_up.fit(net, Backup(tmp_path))
    assert backed_up.same(backed_up.state(net), before)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_digests_are_those_of_sha256sum(net, tmp_path):
    interrupted(reset(net), tmp_path, 8)
    check = ["sha256sum", "--strict", "--check", backup_folder.DIGESTS]
    assert subprocess.run(check, cwd=tmp_path / "backup-00000001").returncode == 0


# -- kills ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_every_call_that_touches_the_disk(net, tmp_path):
    """In the third backup of a training, in a process that begins with two."""
    first = tmp_path / "first"
    interrupted(reset(net), first, 4, save_freq=1)
    assert names(first) == ["backup-00000002", "backup-00000003"]
    ends = {}
    for calls in range(20):
        folder = tmp_path / str(calls)
        shutil.copytree(first, folder)
        code = backed_up.run(backed_up.write_another, folder, calls)
        if code != -9:
            assert code == calls  # it was killed at each of its calls
            break
        whole = backup_folder.BackupFolder(folder).find_whole()
        assert not whole.damaged
        ends[calls] = whole.path.name
        assert not [name for name in names(folder) if name.endswith("unfinished")]
    # mkdir, three files, their folder; from its renaming on it is the new one. Two more names, and removing.
    assert list(ends.values()) == ["backup-00000003"] * 6 + ["backup-00000004"] * (calls - 6)
    assert calls >= 9


@pytest.mark.slow
@pytest.mark.parametrize("calls", [2, 5, 6, 7], ids=["writing", "before", "after", "removing"])
def test_a_killed_training(net, calls, tmp_path):
    assert backed_up.run(backed_up.train, tmp_path, calls=calls) == -9
    assert len(names(tmp_path)) >= 2
    assert_ends_as_uninterrupted(net, tmp_path)


@pytest.mark.slow
def test_a_full_disk(net, tmp_path):
    size = sum(array.nbytes for array in net.after) - 1
    folder, error = tmp_path / "backups", tmp_path / "error.txt"
    assert backed_up.run(backed_up.train, folder, limit=size, error=error) == 1
    assert error.read_text() == (
        f"{errno.EFBIG} [Errno {errno.EFBIG}] No backup could be written in {folder}: "
        f"{os.strerror(errno.EFBIG)}. The backup before it, {folder / 'backup-00000003'}, is whole. "
        "Make room and start the program again"
    )
    assert names(folder) == ["backup-00000002", "backup-00000003"]
    assert_ends_as_uninterrupted(net, folder)


def test_slots_that_were_added_later_count_from_where_they_were_added(tmp_path):
    """Their bias corrections do, before a backup and after it."""
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")

    def make():
        keras.utils.set_random_seed(0)
        body, head = keras.layers.Dense(4, name="body"), keras.layers.Dense(1, name="head")
        model = keras.Sequential([keras.Input((4,)), head, body])
        optimizer = tav.AdamW(0.125)
        optimizer.build(head.trainable_variables)
        return model, body, head, optimizer

    def run(model, optimizer, backup=None, epochs=1):
        model.compile(optimizer, "mse")
        callbacks = [] if backup is None else [backup]
        model.fit(x, x, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)

    def begun():
        model, body, _, optimizer = make()
        body.trainable = False
        run(model, optimizer)
        body.trainable = True
        optimizer.build(model.trainable_variables)
        return model, optimizer

    whole, optimizer = begun()
    run(whole, optimizer, epochs=2)
    killed, optimizer = begun()
    run(killed, optimizer, tav.callbacks.AtomicBackupAndRestore(tmp_path, delete_checkpoint=False))
    again, _, _, optimizer = make()
    optimizer.build(again.trainable_variables)
    run(again, optimizer, tav.callbacks.AtomicBackupAndRestore(tmp_path), epochs=2)
    for have, want in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)


def stopped(folder, model, after, **options):
    """A training that ends by an error after so many steps."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations.numpy()) >= after:
                raise KeyboardInterrupt

    backup = tav.callbacks.AtomicBackupAndRestore(folder, save_freq=1)
    x = np.random.default_rng(0).normal(size=(88, 4))
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=[backup, Stop()], **options)


def small(steps_per_execution):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    model.compile("lamb", "mse", steps_per_execution=steps_per_execution)
    return model


@pytest.mark.parametrize(
    ("first", "then", "fits"), [(4, 3, False), (4, 2, True), (1, 4, False), (4, 4, True)]
)
def test_steps_per_execution_that_do_not_end_at_the_backup_are_an_error(first, then, fits, tmp_path):
    stopped(tmp_path, small(first), 6 if first == 1 else 8)
    model, x = small(then), np.random.default_rng(0).normal(size=(96, 4))
    backup = tav.callbacks.AtomicBackupAndRestore(tmp_path, save_freq=1)
    fit = functools.partial(model.fit, x, x, batch_size=8, shuffle=False, verbose=0, callbacks=[backup])
    if fits:
        fit()
        assert int(model.optimizer.iterations.numpy()) == 12
    else:
        with pytest.raises(ValueError, match=f"no multiple of steps_per_execution={then}"):
            fit()


def test_two_that_go_on_in_one_fit_are_an_error(tmp_path):
    stopped(tmp_path / "a", small(1), 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    both = [tav.callbacks.AtomicBackupAndRestore(tmp_path / name) for name in "ab"]
    x = np.zeros((88, 4))
    with pytest.raises(ValueError, match="one AtomicBackupAndRestore"):
        small(1).fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=both)


@pytest.mark.parametrize("other", [tav.LAMB, tav.QHAdam, keras.optimizers.AdamW])
def test_another_optimizer_is_an_error(other, tmp_path):
    model = small(1)
    model.compile(tav.AdamW(), "mse")
    stopped(tmp_path, model, 5)
    model = small(1)
    model.compile(other(), "mse")
    backup, x = tav.callbacks.AtomicBackupAndRestore(tmp_path), np.zeros((88, 4))
    with pytest.raises(ValueError, match=rf"tf_adam_variants.AdamW.*Here: \w+.{other.__name__}"):
        model.fit(x, x, batch_size=8, verbose=0, callbacks=[backup])


# -- an exception that ends `fit` ----------------------------------------------------------------------------


class Raise(keras.callbacks.Callback):
    """Raises an exception in one of its methods."""

    def __init__(self, method, error):
        super().__init__()

        def raise_error(*args, **kwargs):
            raise error

        setattr(self, method, raise_error)


@pytest.mark.parametrize("order", [1, -1], ids=["before it", "after it"])
@pytest.mark.parametrize("method", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin"])
def test_nothing_stays_in_a_model_after_an_exception(net, method, order, tmp_path):
    """The next `fit` without the callback is a whole one. So is training batch by batch."""
    interrupted(reset(net), tmp_path, 10, save_freq=2)  # the second epoch, after two steps
    for then, error in (("fit", KeyboardInterrupt), ("train_on_batch", ValueError)):
        callbacks = [Backup(tmp_path), Raise(method, error)][::order]
        with pytest.raises(error):
            backed_up.fit(reset(net), *callbacks)
        reset(net)
        if then == "fit":
            assert backed_up.fit(net) == net.history_wanted
            assert backed_up.same(backed_up.state(net), net.after)
            assert len(backed_up.fit(net, initial_epoch=1)["loss"]) == backed_up.EPOCHS - 1
        else:
            before = int(net.optimizer.iterations)
            net.train_on_batch(backed_up.X[:6], backed_up.Y[:6])
            assert int(net.optimizer.iterations) == before + 1
    assert_ends_as_uninterrupted(net, tmp_path, save_freq=2)


def test_a_backup_after_an_exception_in_a_fit_that_resumed(net, tmp_path):
    """Its own next `fit` skips what it has to, also where the last one left a step replaced."""
    interrupted(reset(net), tmp_path, 6, save_freq=1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            backed_up.fit(reset(net), Backup(tmp_path), Raise("on_train_batch_begin", KeyboardInterrupt))
    assert_ends_as_uninterrupted(net, tmp_path, save_freq=1)


def test_an_empty_backup_beside_one_that_resumes(net, tmp_path):
    interrupted(reset(net), tmp_path / "full", 8)
    history = backed_up.fit(reset(net), Backup(tmp_path / "full"), Backup(tmp_path / "empty"))
    assert len(history["loss"]) == backed_up.EPOCHS - 1
    assert backed_up.same(backed_up.state(net), net.after)
