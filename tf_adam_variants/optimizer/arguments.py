"""The arguments that every optimizer accepts by keyword: one table of defaults, checks and texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypedDict

from tf_adam_variants.utils import checks
from tf_adam_variants.utils.checks import Check


class Common(TypedDict, total=False):
    """The keyword arguments of every optimizer: those of this package, then those of Keras."""

    exclude_from_weight_decay: Iterable[str] | None
    sparse_update: str
    fused: str | bool
    master_weights: bool
    stochastic_rounding: bool
    name: str
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None


class Argument(NamedTuple):
    """An argument's default, its check, and its text in the docstrings."""

    default: Any
    check: Check
    text: str


COMMON = {
    "exclude_from_weight_decay": Argument(
        None,
        checks.check_patterns,
        "list of regular expressions or None. A variable does not decay if one of them matches its path "
        '("sequential/dense/kernel") in `re.search`. Saved with the configuration. The method of the same '
        "name adds to the list. A pattern that matches no variable causes a warning.",
    ),
    "sparse_update": Argument(
        "exact",
        checks.one_of_check("exact", "lazy"),
        'how `tf.IndexedSlices` gradients are applied. "exact": as the equivalent dense gradient. '
        '"lazy": update (moments, decay, weights) only the rows present in the gradient, as '
        "`torch.optim.SparseAdam` does; bias correction uses the global step. Both sum repeated indices "
        "first. With `gradient_accumulation_steps` the rows are those whose accumulated gradient is not "
        "all zeros. An index outside the table raises an InvalidArgumentError, and no variable changes; "
        "XLA (`jit_compile=True`) cannot raise errors: there such an index changes no row.",
    ),
    "fused": Argument(
        "auto",
        checks.check_auto_or_bool,
        'whether the fused kernels run the step. "auto": if they are built, can be loaded and support '
        "the step, see `tf_adam_variants.fused`. True: always; a ValueError if they cannot. False: never. "
        "If you set the attribute later, it applies to steps that are traced from then on.",
    ),
    "master_weights": Argument(
        False,
        checks.check_bool,
        'bool. True: each float16 or bfloat16 variable has a float32 copy in a slot "master_weight". The '
        "step updates the copy and rounds it to nearest into the variable, so that small changes add up. "
        "If you assign to the variable, for example by loading weights, the next step resets the changed "
        "elements of the copy. At least one variable must have half precision.",
    ),
    "stochastic_rounding": Argument(
        False,
        checks.check_bool,
        "bool. True: new weights of float16 and bfloat16 variables are rounded up or down at random, in "
        "proportion. They are correct on average and need no copy. The random numbers depend on the step "
        "count and on a seed, which is drawn from Python's `random` (`keras.utils.set_random_seed`) and "
        "saved. Not with `master_weights`.",
    ),
    "name": Argument(
        None,
        checks.check_str,
        "str, not empty.",
    ),
    "clipnorm": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. The largest norm of each gradient; a larger gradient is scaled down.",
    ),
    "clipvalue": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. Each element of a gradient is clipped to [-clipvalue, clipvalue].",
    ),
    "global_clipnorm": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. The largest norm of all gradients together; larger gradients are scaled down "
        "by one factor. At most one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Under a "
        "distribution strategy they clip the sum of the gradients over the replicas.",
    ),
    "use_ema": Argument(
        False,
        checks.check_bool,
        "bool. True: the optimizer keeps an exponential moving average of the weights.",
    ),
    "ema_momentum": Argument(
        0.99,
        checks.check_fraction,
        "float in [0, 1], the decay rate of the average per batch, also between the updates of "
        "`gradient_accumulation_steps`.",
    ),
    "ema_overwrite_frequency": Argument(
        None,
        checks.int_or_none_check(1),
        "int >= 1 or None, in updates: how often the average overwrites the weights. None: only at the end "
        "of `fit`.",
    ),
    "loss_scale_factor": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None, the factor that multiplies the loss and divides the gradients.",
    ),
    "gradient_accumulation_steps": Argument(
        None,
        checks.int_or_none_check(2),
        "int >= 2 or None, the number of batches per update. An update uses the mean of the gradients since "
        "the last update. It changes only variables with a gradient in its last batch. Learning rate "
        "schedules and averages count batches, as in Keras: multiply their steps by this number.",
    ),
}


def check_argument(name: str, value: Any) -> Any:
    """The value of a common argument, if it is allowed."""
    return COMMON[name].check(name, value)


_CLIPPINGS = ("clipnorm", "clipvalue", "global_clipnorm")


def check_names(given: Mapping[str, Any], known: list[str], cls: str) -> None:
    """Raise a ValueError for the first unknown argument, and suggest a known name."""
    for name, value in given.items():
        if name not in known:
            nearest = _nearest(name, known)
            meant = f" Did you mean `{nearest}`?" if nearest else ""
            raise ValueError(
                f"Argument not recognized: {name}={value!r}.{meant} {cls} takes {', '.join(known)}"
            )


def _nearest(name: str, known: list[str]) -> str | None:
    """The known name with these initials (lr, wd), or with the closest spelling."""
    initials = (one for one in known if "".join(word[0] for word in one.split("_")) == name.lower())
    spelling = iter(difflib.get_close_matches(name.lower(), known, cutoff=0.5))
    return next(initials, None) or next(spelling, None)


def check_together(options: Mapping[str, Any]) -> None:
    """Raise for options that exclude each other."""
    clippings = {name: options.get(name) for name in _CLIPPINGS}
    if sum(value is not None for value in clippings.values()) > 1:
        received = ", ".join(f"{name}={value!r}" for name, value in clippings.items())
        raise ValueError(  # in the words of Keras, which programs may match
            f"Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Received: {received}"
        )
    if options.get("stochastic_rounding") and options.get("master_weights"):
        checks.reject("stochastic_rounding", True, "False with master_weights=True, which rounds to nearest")
    if options.get("ema_overwrite_frequency") and not options.get("use_ema"):
        checks.reject(
            "ema_overwrite_frequency", options["ema_overwrite_frequency"], "None unless use_ema=True"
        )
