"""Whether XLA compiles what is being traced. TensorFlow has no public name for it."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext


def is_compiling() -> bool:
    """Whether what is being traced will be compiled by XLA (`jit_compile=True`)."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
