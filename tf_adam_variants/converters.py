"""Hyperparameters of another method, converted to those of QHAdam.

Reference:
    Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019,
    https://arxiv.org/abs/1810.06801 (section 5).
"""

from __future__ import annotations

from typing import NamedTuple


class QHAdamParameters(NamedTuple):
    """Arguments of `QHAdam` and `QHAdamW`: ``QHAdam(**parameters._asdict())``."""

    learning_rate: float
    beta_1: float
    beta_2: float
    nu_1: float
    nu_2: float


def from_nadam(learning_rate: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.999) -> QHAdamParameters:
    """NAdam (Dozat, 2016), that is Adam with Nesterov momentum, as QHAdam: nu_1 = beta_1, nu_2 = 1.

    The two differ in the bias correction of the first steps.

    Examples:
        >>> from_nadam(2e-3, 0.9, 0.999)
        QHAdamParameters(learning_rate=0.002, beta_1=0.9, beta_2=0.999, nu_1=0.9, nu_2=1.0)
        >>> import tf_adam_variants as tav
        >>> tav.QHAdam(**from_nadam(2e-3)._asdict()).nu_1
        0.9
    """
    return QHAdamParameters(learning_rate, beta_1, beta_2, nu_1=beta_1, nu_2=1.0)
