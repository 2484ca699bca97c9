"""Hyperparameters of other methods, converted to the quasi-hyperbolic (QH) ones.

Pure functions of Python numbers that return named tuples whose fields are the arguments' names.

Reference:
    Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019,
    https://arxiv.org/abs/1810.06801 (sections 4 and 5, appendix C).
"""

from __future__ import annotations

import math
from typing import NamedTuple


class QHAdamParameters(NamedTuple):
    """Arguments of `QHAdam` and `QHAdamW`: ``QHAdam(**parameters._asdict())``."""

    learning_rate: float
    beta_1: float
    beta_2: float
    nu_1: float
    nu_2: float


class QHMParameters(NamedTuple):
    """Quasi-hyperbolic momentum: m <- beta m + (1 - beta) g; w <- w - learning_rate ((1 - nu) g + nu m)."""

    learning_rate: float
    beta: float
    nu: float


class PIDParameters(NamedTuple):
    """Gains of a PID controller on the gradient g.

    w - w_0 = -(k_p g + k_i sum(g) + k_d d),  where d <- beta d + (1 - beta) (g - g_before)
    """

    k_p: float
    k_i: float
    k_d: float


def from_nadam(learning_rate: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.999) -> QHAdamParameters:
    """NAdam (Dozat, 2016), that is Adam with Nesterov momentum, as QHAdam: nu_1 = beta_1, nu_2 = 1.

    The two agree but for the bias correction of the first steps.

    Examples:
        >>> from_nadam(2e-3, 0.9, 0.999)
        QHAdamParameters(learning_rate=0.002, beta_1=0.9, beta_2=0.999, nu_1=0.9, nu_2=1.0)
        >>> import tf_adam_variants as tav
        >>> tav.QHAdam(**from_nadam(2e-3)._asdict()).nu_1
        0.9
    """
    return QHAdamParameters(learning_rate, beta_1, beta_2, nu_1=beta_1, nu_2=1.0)


def from_nesterov(learning_rate: float, momentum: float) -> QHMParameters:
    """SGD with Nesterov momentum as Keras and PyTorch write it: velocity without (1 - momentum).

    Examples:
        >>> from_nesterov(0.125, 0.5)
        QHMParameters(learning_rate=0.25, beta=0.5, nu=0.5)
    """
    return QHMParameters(learning_rate / (1.0 - momentum), beta=momentum, nu=momentum)


def from_pid(k_p: float, k_i: float, k_d: float) -> QHMParameters:
    """A PID controller (An et al., 2018) as QHM; the inverse of `to_pid`.

    Examples:
        >>> from_pid(-1.5, 1.0, 1.5)
        QHMParameters(learning_rate=1.0, beta=0.5, nu=1.5)
    """
    return QHMParameters(learning_rate=k_i, beta=k_d / (k_d - k_p), nu=k_p * k_p / (k_i * k_d))


def to_pid(learning_rate: float, beta: float, nu: float) -> PIDParameters:
    """QHM as a PID controller; beta must not be 0.

    Examples:
        >>> to_pid(1.0, 0.5, 1.5)
        PIDParameters(k_p=-1.5, k_i=1.0, k_d=1.5)
    """
    k_p = -learning_rate * nu * beta / (1.0 - beta)
    return PIDParameters(k_p, k_i=learning_rate, k_d=learning_rate * nu * (beta / (1.0 - beta)) ** 2)


def from_synthesized_nesterov(learning_rate: float, beta_1: float, beta_2: float) -> QHMParameters:
    """Synthesized Nesterov variants (Lessard et al., 2016) as QHM; beta_1 must not be 0.

        x' = x - learning_rate grad(x + beta_2 (x - x_before)) + beta_1 (x - x_before)

    Examples:
        >>> from_synthesized_nesterov(0.25, 0.5, 0.5)
        QHMParameters(learning_rate=0.5, beta=0.5, nu=0.5)
    """
    return QHMParameters(
        learning_rate / (1.0 - beta_1), beta=beta_1, nu=1.0 - (1.0 - beta_1) / beta_1 * beta_2
    )


def from_robust_momentum(smoothness: float, kappa: float, rho: float | None = None) -> QHMParameters:
    """The robust momentum method (Cyrus et al., 2018) as QHM.

    Args:
        smoothness: L, the largest curvature of the objective.
        kappa: the condition number, > 1.
        rho: the rate of convergence asked for, between 1 - 1/sqrt(kappa) (fastest, the default) and
            1 - 1/kappa (most robust).

    Examples:
        >>> from_robust_momentum(1.0, 4.0).beta
        0.16666666666666666
    """
    if rho is None:
        rho = 1.0 - 1.0 / math.sqrt(kappa)
    step = (1.0 - rho) ** 2 * (1.0 + rho)
    return from_synthesized_nesterov(
        learning_rate=kappa * step / smoothness,
        beta_1=kappa * rho**3 / (kappa - 1.0),
        beta_2=rho**3 / ((kappa - 1.0) * step),
    )


def from_accsgd(delta: float, kappa: float, xi: float, epsilon: float = 0.7) -> QHMParameters:
    """AccSGD (Kidambi et al., 2018) as QHM.

    Args:
        delta: the short step, > 0.
        kappa: the long step's ratio to the short one, >= 1.
        xi: the statistical advantage, >= 1 and <= sqrt(kappa).
        epsilon: the paper's small constant, 0.7.

    Examples:
        >>> from_accsgd(0.1, 1000.0, 10.0).nu
        0.7792207792207793
    """
    return QHMParameters(
        learning_rate=delta * epsilon * (1.0 + xi) / (1.0 + epsilon),
        beta=(kappa - epsilon**2 * xi) / (kappa + epsilon * xi),
        nu=(epsilon * xi - 1.0) / (epsilon * (1.0 + xi)),
    )
