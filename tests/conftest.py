import keras
import pytest
import tensorflow as tf

# Three replicas need three devices, and how many there are is fixed once TensorFlow runs its first op.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
)


@pytest.fixture(autouse=True)
def fresh_state():
    """Layer names and seeds start over in every test, so that no test depends on another."""
    keras.utils.clear_session(free_memory=False)  # to collect garbage 2,000 times takes minutes
    keras.utils.set_random_seed(0)
