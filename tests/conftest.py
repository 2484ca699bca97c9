import gc
import threading

import keras
import pytest
import tensorflow as tf
from keras.src.backend.common import global_state

# Three replicas need three devices, and how many there are is fixed once TensorFlow runs its first op.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
)


@pytest.fixture(autouse=True)
def fresh_state():
    """Layer names and seeds start over in every test, so that no test depends on another."""
    # `keras.utils.clear_session` would drop TensorFlow's kernels as well, which takes a tenth of the time.
    global_state.GLOBAL_STATE_TRACKER = threading.local()
    global_state.GLOBAL_SETTINGS_TRACKER = threading.local()
    keras.utils.set_random_seed(0)
    yield
    # The garbage of a test is not looked at again: to free an iterator of tf.data, TensorFlow waits.
    gc.freeze()
