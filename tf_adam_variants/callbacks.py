"""Callbacks for `fit`, for these optimizers and for Keras's."""

from tf_adam_variants._atomic_backup import AtomicBackupAndRestore
from tf_adam_variants._trust_ratio_logger import TrustRatioLogger

__all__ = ["AtomicBackupAndRestore", "TrustRatioLogger"]
