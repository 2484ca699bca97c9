"""`@variant`: what makes a class an optimizer of this package."""

from __future__ import annotations

import inspect
from typing import TypeVar, get_type_hints

import keras

from tf_adam_variants import _docs
from tf_adam_variants._arguments import COMMON, Common
from tf_adam_variants._optimizer import AdamVariant

Variant = TypeVar("Variant", bound=type[AdamVariant])


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
    cls.__doc__ = _docs.completed(cls.__doc__ or "", [p.name for p in common])
    return keras.saving.register_keras_serializable("tf_adam_variants")(cls)
