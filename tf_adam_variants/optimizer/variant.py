"""`@variant`: registers an optimizer with Keras and completes its signature and its docstring."""

from __future__ import annotations

import inspect
import textwrap
from typing import TypeVar, get_type_hints

import keras

from tf_adam_variants.optimizer.arguments import COMMON, Common
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.utils import internals

Variant = TypeVar("Variant", bound=type[AdamVariant])

# Texts that the docstrings of several optimizers have in common.
HYPERPARAMETERS = {
    "learning_rate": (
        "float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments."
    ),
    "weight_decay": ("float >= 0, l above, dimensionless. 0 or None for none."),
    "beta_1": ("float in [0, 1), the decay of the first moment."),
    "beta_2": ("float in [0, 1), the decay of the second moment."),
    "nu_1": (
        "finite float, the weight of the first moment against the gradient in the numerator; 1 is "
        "Adam, 0 the plain gradient."
    ),
    "nu_2": (
        "finite float, the weight of the second moment against the squared gradient under the root; 1 "
        "is Adam."
    ),
    "epsilon": ("float >= 0, outside the root and after bias correction, in units of the gradient."),
    "weight_decay_mode": (
        'the factor s. "learning_rate": the learning rate of the step (Keras, PyTorch, optax). '
        '"schedule": the learning rate over its peak (eta_t in the paper: the peak is tuned and the '
        'decay stays). "independent": 1.'
    ),
    "peak_learning_rate": (
        'float > 0, the peak for "schedule". By default the float given as learning rate, or a '
        "schedule's `initial_learning_rate` (`warmup_target` where it warms up)."
    ),
}

TYPES = """
Variables are float16, bfloat16, float32 or float64. The moments and all arithmetic are float32 for the
half types and of the variable's own type otherwise; each variable has the slots "momentum" and
"velocity" of its shape. Arguments may be set later as attributes, with the same checks; a step that is
traced keeps those that it was traced with.
"""

RAISES = """
Raises:
    ValueError: on an argument outside its range, naming it; in `apply`, where gradients and variables
        do not match; on loading, where the saved state has other slots.
"""


def variant(cls: Variant) -> Variant:
    """Register an optimizer with Keras, and complete its signature and its docstring.

    Its constructor takes its hyperparameters and `**common`, the arguments of every optimizer. In `help`
    these then show as if they were written out.
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
    """A docstring with {{name}} replaced by the entry of that argument, {{common}} by those of these names.

    {{types}} and {{raises}} are the paragraphs above.
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


def register_short_names(*optimizers: type[keras.optimizers.Optimizer]) -> None:
    """Make each class known to Keras by its name and by its name in lower case.

    A name that Keras, or somebody else's registration, resolves already is left as it is: "adamw"
    stays Keras's own.
    """
    known = keras.saving.get_custom_objects()
    for optimizer in optimizers:
        for name in (optimizer.__name__, optimizer.__name__.lower()):
            if name not in known and name.lower() not in internals.keras_optimizer_names():
                known[name] = optimizer
