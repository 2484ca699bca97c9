import keras
import pytest


@pytest.fixture(autouse=True)
def fresh_state():
    """Layer names and seeds start over in every test, so that no test depends on another."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
