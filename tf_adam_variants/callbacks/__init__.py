"""Callbacks for `fit`, for these optimizers and for Keras's."""

from tf_adam_variants.callbacks.atomic_backup import AtomicBackupAndRestore
from tf_adam_variants.callbacks.trust_ratio_logger import TrustRatioLogger

__all__ = ["AtomicBackupAndRestore", "TrustRatioLogger"]
