"""The arguments that every optimizer takes by keyword: default, check and text of each, in one table."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypedDict

from tf_adam_variants.utils import checks
from tf_adam_variants.utils.checks import Check


class Common(TypedDict, total=False):
    """What every optimizer takes by keyword: the package's own, then Keras's."""

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
        "list of regular expressions, `re.search`ed in the variables' paths "
        '("sequential/dense/kernel"): those that match do not decay. Saved with the configuration. '
        "Keras's method of the same name adds to it. A pattern that matches no variable is warned of.",
    ),
    "sparse_update": Argument(
        "exact",
        checks.one_of_check("exact", "lazy"),
        'what a `tf.IndexedSlices` gradient does. "exact": what the dense gradient would do. "lazy": '
        "only the rows it names change, in the variable and its slots, by moments and decay alike; "
        "the bias correction counts all steps. Repeated ids are summed first in both. With "
        "`gradient_accumulation_steps` the rows are those whose accumulated gradient is not all "
        "zeros. Ids outside the table are an InvalidArgumentError and nothing is written; XLA "
        "(`jit_compile=True`) has no errors, and there they name no row.",
    ),
    "fused": Argument(
        "auto",
        checks.check_auto_or_bool,
        'whether the compiled op takes the step. "auto": wherever it is built, loads and applies, see '
        "`tf_adam_variants.fused`. True: a ValueError where it cannot. False: never. The attribute "
        "may be set later and holds for the steps that are traced from then on.",
    ),
    "master_weights": Argument(
        False,
        checks.check_bool,
        'bool. True: float16 and bfloat16 variables have a float32 copy in a slot "master_weight", '
        "which the step updates and rounds to nearest into the variable, so that no change is too "
        "small to count. An element that is assigned from outside, as by loading weights, is taken "
        "over into the copy by the next step. For variables of which some at least have a half type.",
    ),
    "stochastic_rounding": Argument(
        False,
        checks.check_bool,
        "bool. True: new weights of float16 and bfloat16 variables are rounded up or down at random, "
        "in proportion, so that they are right on average, without a copy. The random numbers are "
        "made from a seed that is saved, drawn from Python's `random` "
        "(`keras.utils.set_random_seed`), and from the count of steps. Not together with "
        "`master_weights`.",
    ),
    "name": Argument(
        None,
        checks.check_str,
        "str, not empty.",
    ),
    "clipnorm": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. Each gradient is scaled down to at most this norm.",
    ),
    "clipvalue": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. Each element of a gradient is clipped to [-clipvalue, clipvalue].",
    ),
    "global_clipnorm": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. All gradients together are scaled down to at most this norm. Only one of "
        "the three clippings can be set. Under a distribution strategy all three clip the gradients "
        "that are summed over the replicas.",
    ),
    "use_ema": Argument(
        False,
        checks.check_bool,
        "bool. True: an exponential moving average of the weights is kept.",
    ),
    "ema_momentum": Argument(
        0.99,
        checks.check_fraction,
        "float in [0, 1], the decay of that average.",
    ),
    "ema_overwrite_frequency": Argument(
        None,
        checks.int_or_none_check(1),
        "int >= 1 or None. Every so many steps the weights are set to their average; None: at the end "
        "of `fit`.",
    ),
    "loss_scale_factor": Argument(
        None,
        checks.check_positive_or_none,
        "float > 0 or None. The loss is multiplied by it, the gradients are divided by it.",
    ),
    "gradient_accumulation_steps": Argument(
        None,
        checks.int_or_none_check(2),
        "int >= 2 or None. The weights are updated every so many steps, by the mean of the gradients "
        "since the last update.",
    ),
}


def check_argument(name: str, value: Any) -> Any:
    """The value of a common argument, if it is allowed."""
    return COMMON[name].check(name, value)


_CLIPPINGS = ("clipnorm", "clipvalue", "global_clipnorm")


def check_names(given: Mapping[str, Any], known: list[str], cls: str) -> None:
    """Raise for the first argument that is not known, with the one it may have been meant for."""
    for name, value in given.items():
        if name not in known:
            nearest = _nearest(name, known)
            meant = f" Did you mean `{nearest}`?" if nearest else ""
            raise ValueError(
                f"Argument not recognized: {name}={value!r}.{meant} {cls} takes {', '.join(known)}"
            )


def _nearest(name: str, known: list[str]) -> str | None:
    """By its initials, as in lr and wd, or its spelling."""
    initials = (one for one in known if "".join(word[0] for word in one.split("_")) == name.lower())
    spelling = iter(difflib.get_close_matches(name.lower(), known, cutoff=0.5))
    return next(initials, None) or next(spelling, None)


def check_together(options: Mapping[str, Any]) -> None:
    """Raise for options that exclude each other."""
    clippings = {name: options[name] for name in _CLIPPINGS if options.get(name) is not None}
    if len(clippings) > 1:
        received = ", ".join(f"{name}={value!r}" for name, value in clippings.items())
        raise ValueError(f"Only one of {', '.join(_CLIPPINGS)} can be set. Received: {received}")
    if options.get("stochastic_rounding") and options.get("master_weights"):
        checks.reject("stochastic_rounding", True, "False with master_weights=True, which rounds to nearest")
    if options.get("ema_overwrite_frequency") and not options.get("use_ema"):
        checks.reject(
            "ema_overwrite_frequency", options["ema_overwrite_frequency"], "None unless use_ema=True"
        )
