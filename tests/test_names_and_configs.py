"""Names that Keras resolves, and configurations that come back as they went."""

import ast
import json
import subprocess
import sys
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
from axes import CLASSES

import tf_adam_variants as tav
from tf_adam_variants.optimizer.variant import register_short_names
from tf_adam_variants.utils import internals

# A value other than the default for every argument. None of them is Keras's own business to check.
COMMON = {
    "learning_rate": 0.25,
    "beta_1": 0.5,
    "beta_2": 0.75,
    "epsilon": 0.125,
    "exclude_from_weight_decay": ["bias", "^norm/"],
    "clipvalue": 2.0,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 3,
    "loss_scale_factor": 2.0,
    "gradient_accumulation_steps": 4,
    "sparse_update": "exact",
    "fused": "auto",
    "master_weights": True,
    "stochastic_rounding": False,
    "name": "mine",
}


DECAY = {"weight_decay": 0.5, "weight_decay_mode": "schedule", "peak_learning_rate": 0.75}
NUS = {"nu_1": 0.5, "nu_2": 0.25}
ARGUMENTS = {
    tav.AdamW: COMMON | DECAY | {"amsgrad": True},
    tav.QHAdam: COMMON | NUS,
    tav.QHAdamW: COMMON | DECAY | NUS,
    tav.LAMB: COMMON
    | {
        "weight_decay": 0.5,
        "exclude_from_layer_adaptation": ["bias"],
        "bias_correction": False,
        "grad_averaging": False,
        "trust_ratio_min": 0.5,
        "trust_ratio_max": 2.0,
    },
}


@pytest.mark.parametrize("name", ["QHAdam", "QHAdamW", "LAMB", "qhadam", "qhadamw", "lamb"])
def test_short_names(name):
    optimizer = keras.optimizers.get(name)
    assert type(optimizer).__name__.lower() == name.lower()
    assert type(optimizer).__module__.startswith("tf_adam_variants")


@CLASSES
def test_full_names_and_dictionaries(cls):
    name = f"tf_adam_variants>{cls.__name__}"
    assert type(keras.optimizers.get(name)) is cls
    optimizer = keras.optimizers.get({"class_name": name, "config": {"learning_rate": 0.5}})
    assert type(optimizer) is cls
    assert float(optimizer.learning_rate) == 0.5


def test_a_dictionary_with_a_short_name():
    optimizer = keras.optimizers.get({"class_name": "LAMB", "config": {"learning_rate": 0.5}})
    assert type(optimizer) is tav.LAMB


@pytest.mark.parametrize("name", ["adamw", "AdamW", "adam"])
def test_keras_s_own_names_stay_keras_s(name):
    assert type(keras.optimizers.get(name)).__module__.startswith("keras.")


def test_names_that_are_taken_stay():
    class LAMB(keras.optimizers.SGD):
        pass

    class Fresh(keras.optimizers.SGD):
        pass

    known = keras.saving.get_custom_objects()
    register_short_names(LAMB, Fresh)
    try:
        assert known["LAMB"] is known["lamb"] is tav.LAMB
        assert known["Fresh"] is known["fresh"] is Fresh
    finally:
        del known["Fresh"], known["fresh"]


def warnings_of_registering(*optimizers):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        register_short_names(*optimizers)
    return [str(warning.message) for warning in found]


def test_no_warning_of_names_where_all_is_as_it_was():
    """Keras has always had "adamw"; importing the package again finds its own classes."""
    assert not warnings_of_registering(tav.AdamW, tav.QHAdam, tav.QHAdamW, tav.LAMB)
    assert not warnings_of_registering(*(type(cls.__name__, (cls,), {}) for cls in (tav.AdamW, tav.LAMB)))


@pytest.mark.parametrize("name", ["LAMB", "QHAdam", "QHAdamW"])
def test_a_name_that_keras_takes_is_warned_of(name, monkeypatch):
    """Keras has a Lamb without a name: the day that it gets one, "lamb" means another optimizer."""
    theirs = keras.optimizers.SGD
    monkeypatch.setitem(internals.keras_optimizers(), name.lower(), theirs)
    known = keras.saving.get_custom_objects()
    for short in (name, name.lower()):
        monkeypatch.delitem(known, short)
    (message,) = warnings_of_registering(tav.AdamW, tav.QHAdam, tav.QHAdamW, tav.LAMB)
    for short in (name, name.lower()):
        assert f'"{short}" means keras.src.optimizers.sgd.SGD; write "tf_adam_variants>{name}"' in message
        assert type(keras.optimizers.get(short)) is theirs
        assert short not in known
    assert message.count("; write") == 2
    ours = keras.optimizers.get(f"tf_adam_variants>{name}")
    assert type(ours) is getattr(tav, name)
    assert type(keras.optimizers.deserialize(keras.optimizers.serialize(ours))) is type(ours)


@pytest.mark.slow
def test_importing_warns_of_a_name_that_keras_takes():
    program = (
        "import keras, warnings\n"
        "from keras.src.optimizers import ALL_OBJECTS_DICT\n"
        "ALL_OBJECTS_DICT['lamb'] = keras.optimizers.SGD\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warnings.simplefilter('always')\n"
        "    import tf_adam_variants\n"
        "    import tf_adam_variants.lamb\n"
        "print([(w.filename, str(w.message)) for w in found if 'tf_adam_variants>' in str(w.message)])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ((file, message),) = ast.literal_eval(result.stdout)
    assert file == "<string>"  # the program
    assert message.endswith('"lamb" means keras.src.optimizers.sgd.SGD; write "tf_adam_variants>LAMB"')


@pytest.mark.slow
def test_somebody_else_s_registration_stays():
    """Where another package has taken "lamb" before, its optimizer keeps the name."""
    program = (
        "import keras\n"
        "class Other(keras.optimizers.SGD): pass\n"
        "keras.saving.get_custom_objects()['lamb'] = Other\n"
        "import tf_adam_variants as tav\n"
        "assert type(keras.optimizers.get('lamb')) is Other\n"
        "assert type(keras.optimizers.get('LAMB')) is tav.LAMB\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert '"lamb" means __main__.Other; write "tf_adam_variants>LAMB"' in result.stderr


@CLASSES
def test_every_argument_comes_back(cls):
    arguments = ARGUMENTS[cls]
    config = cls(**arguments).get_config()
    others = {"clipnorm": None, "global_clipnorm": None}
    assert config == arguments | others
    assert set(cls().get_config()) == set(config)
    assert cls.from_config(json.loads(json.dumps(config))).get_config() == config
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(cls(**arguments)))))
    assert type(again) is cls
    assert again.get_config() == config


# An argument as NumPy has it, of each kind.
NUMPY = {
    "scalars": {
        bool: np.bool_,
        int: np.int64,
        float: np.float32,
        str: np.str_,
        list: lambda x: [*map(np.str_, x)],
    },
    "other scalars": {bool: np.bool_, int: np.uint8, float: np.float64, str: np.str_, list: np.array},
    "rare scalars": {bool: np.bool_, int: np.int32, float: np.longdouble, str: np.str_, list: tuple},
    "half precision": {bool: bool, int: int, float: ml_dtypes.bfloat16, str: str, list: list},
    "arrays": dict.fromkeys((bool, int, float, str, list), np.array),
}


def as_numpy(kind, arguments):
    return {name: NUMPY[kind][type(value)](value) for name, value in arguments.items()}


def types(config):
    return {name: type(value) for name, value in config.items()}


@pytest.mark.parametrize("kind", NUMPY)
@CLASSES
def test_every_argument_takes_numpy_s_scalars_and_keeps_python_s(cls, kind):
    arguments = ARGUMENTS[cls] | {"sparse_update": "lazy", "fused": False}
    set_later = cls()
    lists = [name for name in arguments if name.startswith("exclude_")]  # cannot be set later
    for name, value in as_numpy(kind, arguments).items():
        if name not in lists:
            setattr(set_later, name, value)
    made = cls(**as_numpy(kind, arguments))
    expected = cls(**arguments).get_config()
    assert made.get_config() == expected
    assert types(made.get_config()) == types(expected)
    assert json.loads(json.dumps(made.get_config())) == expected
    for name in lists:
        assert {*map(type, made.get_config()[name])} == {str}
        assert set_later.get_config()[name] is None
    assert json.dumps(set_later.get_config() | {name: expected[name] for name in lists}) == json.dumps(
        expected
    )
    for clip in ("clipnorm", "global_clipnorm"):
        assert type(cls(**as_numpy(kind, {clip: 0.5})).get_config()[clip]) is float


@pytest.mark.parametrize("kind", NUMPY)
def test_a_warm_up_takes_numpy_s_scalars(kind):
    arguments = {
        "schedule": 0.5,
        "warmup_steps": 4,
        "initial_learning_rate": 0.25,
        "shift_schedule": True,
        "name": "a",
    }
    made, set_later = (
        tav.schedules.LinearWarmup(**as_numpy(kind, arguments)),
        tav.schedules.LinearWarmup(0.1, 2),
    )
    for name, value in as_numpy(kind, arguments).items():
        setattr(set_later, name, value)
    for schedule in (made, set_later):
        assert json.dumps(schedule.get_config()) == json.dumps(arguments)
        assert types(schedule.get_config()) == types(arguments)
        assert float(schedule(2)) == 0.375
    with pytest.raises(ValueError, match="`warmup_steps` must be an integer >= 1"):
        made.warmup_steps = 0


@pytest.mark.parametrize("kind", NUMPY)
def test_callbacks_take_numpy_s_scalars(kind, tmp_path):
    for cls, flag, folder, every in (
        (tav.callbacks.TrustRatioLogger, "history", "log_dir", "update_freq"),
        (tav.callbacks.AtomicBackupAndRestore, "delete_checkpoint", "backup_dir", "save_freq"),
    ):
        for frequency in ("epoch", 3):
            arguments = {folder: str(tmp_path), every: frequency, flag: False}
            callback = cls(**as_numpy(kind, arguments))
            made = {name: getattr(callback, name) for name in arguments}
            assert made == arguments
            assert types(made) == types(arguments)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_the_other_clippings_come_back(clip):
    assert tav.QHAdam.from_config(tav.QHAdam(**{clip: 0.5}).get_config()).get_config()[clip] == 0.5


@CLASSES
def test_lazy_comes_back(cls):
    again = cls.from_config(cls(sparse_update="lazy").get_config())
    assert again.sparse_update == "lazy"
    assert cls.from_config(cls(fused=False).get_config()).fused is False


@CLASSES
def test_schedules_come_back(cls):
    cosine = keras.optimizers.schedules.CosineDecay(0.5, 10)
    for schedule in (
        cosine,
        tav.schedules.LinearWarmup(cosine, 5, 0.125),
        tav.schedules.LinearWarmup(0.5, 5),
    ):
        config = json.loads(json.dumps(keras.optimizers.serialize(cls(schedule))))
        again = keras.optimizers.deserialize(config)
        for step in (0, 3, 5, 8):
            again.iterations.assign(step)
            assert float(again.learning_rate) == float(schedule(step))


@CLASSES
def test_a_compiled_model_s_json(cls):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
    model.compile(optimizer=cls(**ARGUMENTS[cls]), loss="mse")
    config = json.loads(json.dumps(model.get_compile_config()))
    again = keras.models.model_from_json(model.to_json())
    again.compile_from_config(config)
    assert type(again.optimizer) is cls
    assert again.optimizer.get_config() == model.optimizer.get_config()


def test_get_config_gives_copies():
    patterns = ["bias"]
    optimizer = tav.LAMB(exclude_from_weight_decay=patterns, exclude_from_layer_adaptation=patterns)
    patterns.append("kernel")
    config = optimizer.get_config()
    config["exclude_from_weight_decay"].append("x")
    config["exclude_from_layer_adaptation"].append("x")
    assert optimizer.get_config()["exclude_from_weight_decay"] == ["bias"]
    assert optimizer.get_config()["exclude_from_layer_adaptation"] == ["bias"]


@pytest.mark.slow
def test_importing_needs_the_tensorflow_backend():
    program = "import keras; keras.backend.backend = lambda: 'jax'\nimport tf_adam_variants"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "KERAS_BACKEND=tensorflow" in result.stderr


@pytest.mark.slow
def test_importing_does_not_start_tensorflow_s_runtime():
    """Devices can still be configured afterwards, and no memory of a GPU is taken."""
    program = (
        "import tensorflow as tf, tf_adam_variants\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "assert len(tf.config.list_logical_devices('CPU')) == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
