"""AdamW, QHAdam, QHAdamW and LAMB for Keras 3 on TensorFlow.

Importing the package registers the optimizers by name:

>>> import keras
>>> import tf_adam_variants as tav
>>> keras.optimizers.get("qhadamw").weight_decay
0.004
>>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
>>> model.compile(optimizer="lamb", loss="mse")
>>> isinstance(model.optimizer, tav.LAMB)
True
"""

import keras as _keras

if _keras.backend.backend() != "tensorflow":
    raise ImportError(
        "tf_adam_variants needs Keras on the TensorFlow backend. "
        f"Received: the {_keras.backend.backend()!r} backend; set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported"
    )

from tf_adam_variants import callbacks, converters, fused, schedules
from tf_adam_variants.adamw import AdamW
from tf_adam_variants.lamb import LAMB
from tf_adam_variants.optimizer.variant import register_short_names as _register
from tf_adam_variants.qhadam import QHAdam
from tf_adam_variants.qhadamw import QHAdamW

__all__ = ["LAMB", "AdamW", "QHAdam", "QHAdamW", "callbacks", "converters", "fused", "schedules"]
__version__ = "0.1.0"

_register(AdamW, QHAdam, QHAdamW, LAMB)
