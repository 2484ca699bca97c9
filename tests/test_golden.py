"""The trajectories that PyTorch, optax, qhoptim, IPRally, timm and TensorFlow Addons computed."""

import json
import pathlib

import axes
import cases
import numpy as np
import tensorflow as tf
from sparse import train

import tf_adam_variants as tav

FOLDER = pathlib.Path(__file__).parent / "golden"
FILES = sorted(set(FOLDER.glob("*.npz")) - set(FOLDER.glob("*_sparse_*")))
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}


def load(file):
    data = np.load(file)
    meta = json.loads(str(data["meta"]))
    count = sum(key.startswith("init_") for key in data.files)
    arguments = dict(meta["hyperparameters"])
    if meta["optimizer"] == "QHAdam":
        assert arguments.pop("weight_decay") == 0
    if "independent of the learning rate" in meta.get("weight_decay_rule", ""):
        arguments["weight_decay_mode"] = "independent"
    optimizer = getattr(tav, meta["optimizer"])(**arguments)
    inits = [data[f"init_{i}"] for i in range(count)]
    steps = len(data["grads_0"])
    grads = [[data[f"grads_{i}"][t] for i in range(count)] for t in range(steps)]
    params = [[data[f"params_{i}"][t] for i in range(count)] for t in range(steps)]
    if "lrs" in data.files:
        assert set(data["lrs"]) == {arguments["learning_rate"]}
    return optimizer, inits, grads, params, meta.get("names", [f"v{i}" for i in range(count)])


def test_the_files_are_there():
    assert len(FILES) == 9


@axes.pairwise(file=FILES, dtype=list(TOLERANCE), mode=cases.MODES)
def test_golden(file, dtype, mode):
    optimizer, inits, grads, params, names = load(file)
    history = cases.run(mode, optimizer, inits, grads, tf.as_dtype(dtype), names)
    assert cases.worst(history, params) < TOLERANCE[dtype]


@axes.pairwise(sparse_update=["exact", "lazy"], dtype=list(TOLERANCE), mode=cases.MODES)
def test_golden_of_sparse_gradients(sparse_update, dtype, mode):
    file = {"exact": "exact_sparse_lamb_tfa", "lazy": "lazy_sparse_adam_torch"}[sparse_update]
    data = np.load(FOLDER / f"{file}.npz")
    meta = json.loads(str(data["meta"]))
    optimizer = getattr(tav, meta["optimizer"])(**meta["hyperparameters"], sparse_update=sparse_update)
    steps = list(zip(data["indices"], data["values"], strict=True))
    history = train(optimizer, data["init"], steps, tf.as_dtype(dtype), mode)
    assert cases.worst(history, [[p] for p in data["params"]]) < TOLERANCE[dtype]
