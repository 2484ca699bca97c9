"""Training in two processes is training on the global batch, and a worker may be killed."""

import functools
import pathlib
import signal
import subprocess
import sys
import time

import local_cluster
import numpy as np
import pytest
import strategies
import tensorflow as tf

import tf_adam_variants as tav

TESTS = pathlib.Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
EXAMPLE = EXAMPLES / "multi_worker.py"
pytestmark = pytest.mark.slow

OPTIMIZERS = {
    f"{cls.__name__} {options} fused={fused}": functools.partial(cls, 0.125, fused=fused, **options)
    for cls, *all_options in (
        (tav.AdamW, {"sparse_update": "lazy"}),
        (tav.QHAdam, {"sparse_update": "exact"}),
        (tav.QHAdamW, {"sparse_update": "exact"}, {"sparse_update": "lazy"}),
        (tav.LAMB, {"sparse_update": "exact"}, {"sparse_update": "lazy"}, {"global_clipnorm": 2.0}),
    )
    for options in all_options
    for fused in (False, True)
}


def train(strategy, steps):
    """Take the steps with each optimizer. Return what each device holds."""
    return {name: strategies.run_loop(strategy, make, steps) for name, make in OPTIMIZERS.items()}


WORKER = """
import json, sys
sys.path[:0] = sys.argv[1:]
import local_cluster
local_cluster.end_with_the_launcher()
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import test_multi_worker as tests
results = tests.train(strategy, tests.strategies.steps_of_two())
print(json.dumps({name: [a.tolist() for a in device] for name, [device] in results.items()}))
"""


def test_two_workers_are_one_with_the_global_batch(tmp_path):
    """All optimizers, dense and sparse, by each engine: the fused kernels run on a worker's local devices."""
    printed = []
    command = [sys.executable, "-c", WORKER, str(TESTS), str(TESTS / "helpers"), str(EXAMPLES)]
    codes = local_cluster.run(command, {"worker": 2}, tmp_path, printed.append)
    assert codes == [0, 0], (tmp_path / "worker-0.log").read_text()[-3000:]
    expected = train(tf.distribute.get_strategy(), strategies.global_batches(strategies.steps_of_two()))
    assert len(printed) == 2
    for name in OPTIMIZERS:
        actual = [[np.array(a) for a in worker[name]] for worker in printed]
        np.testing.assert_equal(actual[0], actual[1])
        strategies.assert_same(actual, expected[name])


def example(out):
    return [sys.executable, str(EXAMPLE), "--quick", "--fused", "true", "--out", str(out)]


def test_the_example_ends_with_the_same_bits(tmp_path):
    done = subprocess.run(example(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "worker 1 was killed after step 15" in done.stdout
    assert "start 2: killed, from step 10" in done.stdout
    assert "start 2: undisturbed, from step 0" in done.stdout
    files = [tmp_path / name / f"worker-{i}.npz" for name in ("killed", "undisturbed") for i in (0, 1)]
    states = [list(np.load(file).values()) for file in files]
    assert len(states[0]) > 30
    for state in states[1:]:
        np.testing.assert_equal(state, states[0])


def test_no_worker_outlives_the_launcher(tmp_path):
    """Killed so that it can clean up nothing."""
    launcher = subprocess.Popen(example(tmp_path), stdout=subprocess.DEVNULL)
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        time.sleep(0.01)
        assert launcher.poll() is None
    # Before they watch the launcher they are no workers yet, but their input has ended by then.
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 300
    while any(map(alive, workers)):
        time.sleep(0.05)
        assert time.monotonic() < deadline


def alive(pid):
    """Whether a process runs. One that has ended may wait for its parent as a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


COORDINATOR = """
import os, sys
sys.path.insert(0, sys.argv[1])
import local_cluster, tensorflow as tf, tf_adam_variants as tav
worker, ps = (f"127.0.0.1:{port}" for port in local_cluster.free_ports(2))
cluster = tf.train.ClusterSpec({"worker": [worker], "ps": [ps]})
servers = [tf.distribute.Server(cluster, job) for job in cluster.jobs]
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
strategy = tf.distribute.ParameterServerStrategy(resolver)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
with strategy.scope():
    weights, made_inside = tf.Variable([1.0, 2.0]), tav.LAMB()
made_outside = tav.LAMB()
for step in (
    lambda: made_inside.build([weights]),
    lambda: coordinator.schedule(
        tf.function(lambda: strategy.run(lambda: made_outside.apply([tf.ones(2)], [weights])))
    ),
):
    try:
        step()
    except ValueError as error:
        print(error)
sys.stdout.flush()
os._exit(0)  # TensorFlow has no way to stop servers
"""


def test_parameter_servers_are_refused():
    command = [sys.executable, "-c", COORDINATOR, str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (
        done.stdout.count("lamb does not train under ParameterServerStrategy: its workers do not wait") == 2
    )
    assert done.stdout.count("Train under MultiWorkerMirroredStrategy, or in one process") == 2
