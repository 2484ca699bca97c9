"""The trajectories that PyTorch, optax, qhoptim, IPRally, timm and TensorFlow Addons computed."""

import json
import pathlib

import cases
import numpy as np
import pytest
import tensorflow as tf

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


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file, dtype, mode):
    optimizer, inits, grads, params, names = load(file)
    history = cases.run(mode, optimizer, inits, grads, tf.as_dtype(dtype), names)
    assert cases.worst(history, params) < TOLERANCE[dtype]
