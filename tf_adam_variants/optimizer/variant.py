"""`@variant`: registers an optimizer with Keras and completes its signature and its docstring."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from typing import TypeVar, get_type_hints

import keras

from tf_adam_variants.optimizer.arguments import COMMON, Common
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.utils import internals

Variant = TypeVar("Variant", bound=type[AdamVariant])

# Texts that the docstrings of several optimizers share.
HYPERPARAMETERS = {
    "learning_rate": (
        "float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments, "
        "as `lambda: variable`."
    ),
    "weight_decay": (
        "float >= 0 or None, the weight decay l of the formula, dimensionless. 0 or None disables it."
    ),
    "beta_1": ("float in [0, 1), the decay rate of the first moment."),
    "beta_2": ("float in [0, 1), the decay rate of the second moment."),
    "nu_1": (
        "finite float, interpolates the numerator between the gradient (0) and the first moment (1, as in "
        "Adam)."
    ),
    "nu_2": (
        "finite float, interpolates the square under the root between the squared gradient (0) and the "
        "second moment (1, as in Adam)."
    ),
    "epsilon": ("float >= 0, in units of the gradient, added to the root after bias correction."),
    "weight_decay_mode": (
        'the factor s of the formula. "learning_rate": the learning rate of the step (Keras, PyTorch, '
        'optax). "schedule": the learning rate divided by its peak (eta_t in the paper), so that tuning '
        'the peak does not change the decay. "independent": 1.'
    ),
    "peak_learning_rate": (
        'float > 0 or None, the peak for "schedule". Default: the learning rate if it is a float, or the '
        "`warmup_target` or `initial_learning_rate` of a schedule."
    ),
}

TYPES = """
Variables are float16, bfloat16, float32 or float64. The moments and all arithmetic are float32 for half
precision and otherwise have the type of the variable. Each variable has the slots "momentum" and "velocity"
of its shape. You can set arguments later as attributes, with the same checks. Except for the learning rate,
values are fixed in a `tf.function` when it is traced.
"""

RAISES = """
Raises:
    ValueError: if an argument is outside its range; in `apply`, if gradients and variables do not match;
        on loading, if the saved state has other slots.
"""


def variant(cls: Variant) -> Variant:
    """Register an optimizer with Keras, and complete its signature and its docstring.

    The constructor takes its hyperparameters and `**common`, the arguments of every optimizer. `help` then
    shows these as if they were written out.
    """
    own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in own]
    cls._default_name = cls.__name__.lower()
    cls._own_arguments = tuple(name for name in names if name != "self")
    defaults = {name: argument.default for name, argument in COMMON.items()} | {"name": cls._default_name}
    types = get_type_hints(Common)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in defaults.items()
        if name not in names
    ]
    cls.__init__.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    cls.__doc__ = _fill_docstring(cls.__doc__ or "", [p.name for p in common])
    return keras.saving.register_keras_serializable("tf_adam_variants")(cls)


def _fill_docstring(doc: str, common: list[str]) -> str:
    """Replace {{name}} by the text of that argument, and {{common}} by the texts of these names.

    {{types}} and {{raises}} stand for the paragraphs above.
    """
    arguments = HYPERPARAMETERS | {name: argument.text for name, argument in COMMON.items()}
    texts = {name: _entry(name, text) for name, text in arguments.items()}
    texts["common"] = "\n".join(texts[name] for name in common)
    texts |= {"types": TYPES.strip(), "raises": RAISES.strip()}
    lines = []
    for line in inspect.cleandoc(doc).splitlines():
        if line.strip().startswith("{{"):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(textwrap.indent(texts[line.strip(" {}")], indent))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _entry(name: str, text: str) -> str:
    """An argument in an Args section."""
    return textwrap.fill(f"{name}: {text}", 100, subsequent_indent="    ", break_on_hyphens=False)


KEPT_BY_KERAS = frozenset({"adamw"})  # these names were never ours


def register_short_names(*optimizers: type[keras.optimizers.Optimizer]) -> None:
    """Make each class known to Keras by its name and by its name in lower case.

    A name that already resolves, in Keras or by another registration, does not change: Keras keeps "adamw".
    Where that takes another name from us, a configuration with this name means another optimizer than before,
    of which a warning tells.
    """
    known, of_keras = keras.saving.get_custom_objects(), internals.keras_optimizers()
    taken = []
    for optimizer in optimizers:
        for name in (optimizer.__name__, optimizer.__name__.lower()):
            if name not in known and name.lower() not in of_keras:
                known[name] = optimizer
            other = known.get(name) or of_keras[name.lower()]
            ours = other.__module__.partition(".")[0] == __name__.partition(".")[0]
            if other is not optimizer and not ours and name.lower() not in KEPT_BY_KERAS:
                always = keras.saving.get_registered_name(optimizer)
                taken.append(f'"{name}" means {other.__module__}.{other.__name__}; write "{always}"')
    if taken:
        warnings.warn(
            f"Names of optimizers that mean others here than those of tf_adam_variants: {', '.join(taken)}",
            stacklevel=3,  # the import of the package
        )
