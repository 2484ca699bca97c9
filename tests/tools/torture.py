"""Kills, full disks and damaged files: a training ends with the same bits, or with an error.

    PYTHONPATH=tests/helpers python tests/tools/torture.py [--quick] [--seed 1] [--json FILE]

What Keras's own files do not notice, in weights of the model, is counted and shown; anything else that is
different without an error is a failure.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
from backed_up import fit, model, processes, same, state
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tf_adam_variants as tav

WIDTH, LONG = 500, 12  # a model whose files have some 70 KB; epochs
SAME, ERROR, WEIGHTS, DIFFERENT = (
    "the same bits",
    "an error",
    "other weights, silently",
    "another training, silently",
)
MODES = ("callback", "model.save", "save_weights", "tf.train.Checkpoint")


def make_model():
    keras.utils.clear_session(free_memory=False)
    keras.config.disable_interactive_logging()  # after what forgets it
    return model(lambda: tav.QHAdamW(0.05), WIDTH)


# -- kills ---------------------------------------------------------------------------------------------------


def train(folder, out, ready):
    """A training that saves all the time, to its end."""
    made = make_model()
    backup = tav.callbacks.AtomicBackupAndRestore(folder, save_freq=1, delete_checkpoint=False)

    class Ready(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            ready.set()

    fit(made, backup, Ready(), epochs=LONG)
    np.savez(out, *state(made))


def finish(folder, out, seconds=None, in_a_save=False):
    """Train on in a new process, which is killed some seconds after its first step, or in the next save then.

    Returns:
        Whether it came to the end before, and its seconds from the first step on.
    """
    ready = processes.Event()
    process = processes.Process(target=train, args=(folder, out, ready))
    process.start()
    while process.is_alive() and not ready.wait(0.05):
        pass
    begin = time.perf_counter()
    process.join(seconds)
    while in_a_save and process.is_alive() and not unfinished(folder):
        pass
    process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        sys.exit(f"a resumed training failed, see above; its backups are in {folder}")
    return process.exitcode == 0, time.perf_counter() - begin


def unfinished(folder):
    return folder.exists() and any(name.endswith(".unfinished") for name in os.listdir(folder))


def arrays(path):
    with np.load(path) as file:
        return list(file.values())


def kills(count, rng, folder, advance):
    """Kill trainings at random moments and compare their ends with that of one that was left alone."""
    _, seconds = finish(folder / "alone", folder / "alone.npz")
    span = seconds / 2
    wanted = arrays(folder / "alone.npz")
    found, trainings, done = collections.Counter(), 0, 0
    while done < count:
        backups, out = folder / f"backups-{trainings}", folder / f"end-{trainings}.npz"
        ended = False
        while not ended:
            seconds = rng.uniform(0, span) if done < count else None
            ended, _ = finish(backups, out, seconds, in_a_save=seconds is not None and rng.random() < 0.5)
            if not ended:
                found["in the middle of a save" if unfinished(backups) else "between saves"] += 1
                done += 1
                advance()
        trainings += 1
        if not same(arrays(out), wanted):
            sys.exit(f"after kills the training ended otherwise; its backups are in {backups}")
    return found, trainings


# -- a full disk ---------------------------------------------------------------------------------------------


def save(made, mode, folder):
    """Train for an epoch and save the model."""
    if mode == "callback":
        backup = tav.callbacks.AtomicBackupAndRestore(folder, delete_checkpoint=False)
        fit(made, backup, initial_epoch=made.done, epochs=made.done + 1)
        made.done += 1
        return
    fit(made, epochs=1)
    if mode == "model.save":
        made.save(folder / "model.keras")
    elif mode == "save_weights":
        made.save_weights(folder / "model.weights.h5")
    else:
        tf.train.Checkpoint(model=made, optimizer=made.optimizer).save(folder / "ckpt")


def load(mode, folder, other):
    """The model as it was saved, or an exception."""
    if mode == "callback":
        backup = tav.callbacks.AtomicBackupAndRestore(folder, delete_checkpoint=False)
        fit(other, backup, epochs=0)
    elif mode == "model.save":
        return keras.models.load_model(folder / "model.keras")
    elif mode == "save_weights":
        other.load_weights(folder / "model.weights.h5")
    else:
        path = tf.train.latest_checkpoint(folder)
        if path is None:
            raise OSError("no checkpoint")
        tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path).assert_consumed()
    return other


def seeds_apart(made):
    """State without the seeds of Dropout, which Keras's files leave out."""
    return [array for array in state(made) if array.dtype.kind == "f" or array.shape == ()]


@contextlib.contextmanager
def files_not_larger_than(limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def filled(folder, room):
    """A file that leaves some bytes of a small file system."""
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(folder).free - room, 1))
    yield
    (folder / "filler").unlink()


def full_disk(mode, folder, rooms, full, send):
    """Save, train on, save on a full disk; what is there then is the first state, the second, or an error."""
    made, other = make_model(), make_model()
    made.done = 0
    other.optimizer.build(other.trainable_variables)
    for room in rooms:
        place = pathlib.Path(tempfile.mkdtemp(dir=folder))
        save(made, mode, place)
        first = seeds_apart(made)
        raised = "no error"
        with full(room):
            try:
                save(made, mode, place)
            except Exception:
                raised = "an error"
        second = seeds_apart(made)
        try:
            loaded = seeds_apart(load(mode, place, other))
        except Exception:
            left = "none that loads"
        else:
            left = "the one before" if same(loaded, first) else "it" if same(loaded, second) else DIFFERENT
        if raised == "no error" and left != "it":
            left = DIFFERENT
        shutil.rmtree(place)
        send(f"{raised}, {left}")


# -- damaged files -------------------------------------------------------------------------------------------


def files_of(mode, folder):
    pattern = {"callback": "backup-00000002/*", "tf.train.Checkpoint": "ckpt-*"}.get(mode, "model.*")
    return sorted(folder.glob(pattern))


def damaged(mode, original, places, send):
    """For each place, a bit of all files' bits: what comes of a training that loads what was saved."""
    made = make_model()
    made.optimizer.build(made.trainable_variables)
    fit(made, epochs=1)
    before = [v.numpy() for v in [*made.variables, *made.optimizer.variables]]

    def fresh():
        for variable, value in zip([*made.variables, *made.optimizer.variables], before, strict=True):
            variable.assign(value)
        return made

    def ended(folder):
        if mode == "callback":
            fit(fresh(), tav.callbacks.AtomicBackupAndRestore(folder, delete_checkpoint=False), epochs=4)
            return made, state(made)
        loaded = load(mode, folder, fresh())
        found = seeds_apart(loaded)
        if loaded is made:  # traced already: train on
            fit(made, epochs=1)
            found += seeds_apart(made)
        return loaded, found

    def config(loaded):
        return (loaded.get_config(), loaded.optimizer.get_config()) if mode == "model.save" else None

    with tempfile.TemporaryDirectory() as folder:
        loaded, wanted = ended(shutil.copytree(original, pathlib.Path(folder) / "copy"))
        wanted_config = config(loaded)
    own, end = len(made.weights), len(seeds_apart(made))  # the model's own come first, then the optimizer's
    for place in places:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder) / "copy"
            shutil.copytree(original, folder)
            if mode == "callback" and place % 2:
                shutil.rmtree(folder / "backup-00000001")  # else it goes on from this one
            left = place
            for file in files_of(mode, folder):
                data = bytearray(file.read_bytes())
                if left < 8 * len(data):
                    data[left // 8] ^= 1 << left % 8
                    file.write_bytes(data)
                    break
                left -= 8 * len(data)
            try:
                loaded, found = ended(folder)
            except Exception:
                send(ERROR)
                continue
            if same(found, wanted) and config(loaded) == wanted_config:
                send(SAME)
            elif same(found[own:end], wanted[own:end]):
                send(WEIGHTS if config(loaded) == wanted_config else DIFFERENT)
            else:
                send(DIFFERENT)


def prepare(mode, folder, _, send):
    made = make_model()
    made.done = 0
    save(made, mode, folder)
    if mode == "callback":
        save(made, mode, folder)
    send("ready")


# -- children ------------------------------------------------------------------------------------------------


def child(connection, function, arguments):
    function(*arguments, connection.send)


def in_children(function, items, *arguments, advance=lambda: None, limit=120):
    """What a function sends for each item; "a crash" where its process died, and another one goes on."""
    results = []
    while len(results) < len(items):
        receive, send = processes.Pipe(duplex=False)
        rest = items[len(results) :]
        process = processes.Process(target=child, args=(send, function, (*arguments, rest)))
        process.start()
        send.close()
        with contextlib.suppress(EOFError):
            while len(results) < len(items) and receive.poll(limit):
                results.append(receive.recv())
                advance()
        if len(results) < len(items):
            process.join(5)
            if process.exitcode is not None and process.exitcode >= 0:
                sys.exit(f"{function.__name__} failed, see above")
            results.append("no end" if process.is_alive() else "a crash")
            advance()
        process.kill()
        process.join()
    return results


def limited(mode, folder, rooms, send):
    full_disk(mode, folder, rooms, files_not_larger_than, send)


def on_tmpfs(mode, folder, rooms, send):
    full_disk(mode, folder, rooms, lambda room: filled(folder, room), send)


@contextlib.contextmanager
def tmpfs(folder):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


SHOWN = {
    "callback": "`AtomicBackupAndRestore`",
    "model.save": '`model.save("model.keras")`',
    "tf.train.Checkpoint": "`tf.train.Checkpoint`",
    "save_weights": '`model.save_weights("model.weights.h5")`',
}


def markdown(flips):
    """The table of docs/saving.md."""
    outcomes = [ERROR, SAME, WEIGHTS]
    lines = [
        "| saved with | an error | the same training | other weights, silently |",
        "| --- |" + " ---: |" * 3,
    ]
    for mode, shown in SHOWN.items():
        assert set(flips[mode]) <= set(outcomes), flips[mode]
        lines.append(f"| {shown} | {' | '.join(str(flips[mode].get(outcome, 0)) for outcome in outcomes)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--flips", type=int)
    parser.add_argument("--full-disks", type=int)
    parser.add_argument("--json", type=pathlib.Path, help="where to keep what came of flipped bits")
    options = parser.parse_args()
    share = 10 if options.quick else 1
    count = {
        "kills": options.kills if options.kills is not None else 50 // share,
        "flips": options.flips if options.flips is not None else 200 // share,
        "full": options.full_disks if options.full_disks is not None else 20 // share,
    }
    rng = np.random.default_rng(options.seed)
    console = Console()
    table = Table("fault", "what", "what came of it")
    failed, flips = False, {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        folder = pathlib.Path(temporary)

        def bar(name, total):
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        if count["kills"]:
            found, trainings = kills(count["kills"], rng, folder, bar("kills", count["kills"]))
            text = ", ".join(f"{number} {where}" for where, number in found.items())
            table.add_row("kill -9", text, f"{trainings} trainings, each with {SAME}")
        with tmpfs(folder / "tmpfs") as mounted:
            kinds = [("files not larger than a limit", limited, folder)]
            kinds += [("a tmpfs that is full", on_tmpfs, folder / "tmpfs")] if mounted else []
            for kind, function, place in kinds if count["full"] else []:
                for mode in MODES:
                    rooms = [int(n) for n in rng.integers(0, 60_000, count["full"])]
                    advance = bar(f"{kind}: {mode}", len(rooms))
                    results = collections.Counter(in_children(function, rooms, mode, place, advance=advance))
                    failed |= any(DIFFERENT in result or result == "no end" for result in results)
                    failed |= (
                        mode == "callback"
                        and set(results) - {"an error, the one before", "no error, it"} != set()
                    )
                    table.add_row(kind, mode, "\n".join(f"{n}: {what}" for what, n in results.most_common()))
            if not mounted:
                table.add_row("a tmpfs that is full", "", "not tried: mounting one is not permitted")
        for mode in MODES if count["flips"] else []:
            original = folder / mode
            original.mkdir()
            in_children(prepare, [0], mode, original)
            bits = 8 * sum(file.stat().st_size for file in files_of(mode, original))
            places = [int(n) for n in rng.integers(0, bits, count["flips"])]
            results = collections.Counter(
                in_children(
                    damaged, places, mode, original, advance=bar(f"flipped bits: {mode}", len(places))
                )
            )
            flips[mode] = dict(results)
            allowed = {SAME, ERROR, "a crash"} | (
                {WEIGHTS} if mode in ("model.save", "save_weights") else set()
            )
            failed |= set(results) - allowed != set()
            table.add_row(
                "a flipped bit", mode, "\n".join(f"{n}: {what}" for what, n in results.most_common())
            )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(flips, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
