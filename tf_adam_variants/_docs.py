"""Texts that the docstrings of several optimizers have in common, written once."""

from __future__ import annotations

import inspect
import textwrap

ARGUMENTS = {
    "learning_rate": (
        "float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments."
    ),
    "weight_decay": "float >= 0, l above, dimensionless. 0 or None for none.",
    "beta_1": "float in [0, 1), the decay of the first moment.",
    "beta_2": "float in [0, 1), the decay of the second moment.",
    "nu_1": (
        "finite float, the weight of the first moment against the gradient in the numerator; 1 is "
        "Adam, 0 the plain gradient."
    ),
    "nu_2": (
        "finite float, the weight of the second moment against the squared gradient under the root; 1 "
        "is Adam."
    ),
    "epsilon": "float >= 0, outside the root and after bias correction, in units of the gradient.",
    "weight_decay_mode": (
        'the factor s. "learning_rate": the learning rate of the step (Keras, PyTorch, optax). '
        '"schedule": the learning rate over its peak (eta_t in the paper: the peak is tuned and the '
        'decay stays). "independent": 1.'
    ),
    "peak_learning_rate": (
        'float > 0, the peak for "schedule". By default the float given as learning rate, or a '
        "schedule's `initial_learning_rate` (`warmup_target` where it warms up)."
    ),
    "exclude_from_weight_decay": (
        "list of regular expressions, `re.search`ed in the variables' paths "
        '("sequential/dense/kernel"): those that match do not decay. Saved with the configuration. '
        "Keras's method of the same name adds to it. A pattern that matches no variable is warned of."
    ),
    "sparse_update": (
        'what a `tf.IndexedSlices` gradient does. "exact": what the dense gradient would do. "lazy": '
        "only the rows it names change, in the variable and its slots, by moments and decay alike; "
        "the bias correction counts all steps. Repeated ids are summed first in both. With "
        "`gradient_accumulation_steps` the rows are those whose accumulated gradient is not all "
        "zeros. Ids outside the table are an InvalidArgumentError and nothing is written; XLA "
        "(`jit_compile=True`) has no errors, and there they name no row."
    ),
    "fused": (
        'whether the compiled op takes the step. "auto": wherever it is built, loads and applies, see '
        "`tf_adam_variants.fused`. True: a ValueError where it cannot. False: never. The attribute "
        "may be set later and holds for the steps that are traced from then on."
    ),
    "master_weights": (
        'bool. True: float16 and bfloat16 variables have a float32 copy in a slot "master_weight", which '
        "the step updates and rounds to nearest into the variable, so that no change is too small to "
        "count. An element that is assigned from outside, as by loading weights, is taken over into the "
        "copy by the next step. For variables of which some at least have a half type."
    ),
    "stochastic_rounding": (
        "bool. True: new weights of float16 and bfloat16 variables are rounded up or down at random, in "
        "proportion, so that they are right on average, without a copy. The random numbers are made "
        "from a seed that is saved, drawn from Python's `random` (`keras.utils.set_random_seed`), and "
        "from the count of steps. Not together with `master_weights`."
    ),
    "name": "str, not empty.",
    "clipnorm": "float > 0 or None. Each gradient is scaled down to at most this norm.",
    "clipvalue": "float > 0 or None. Each element of a gradient is clipped to [-clipvalue, clipvalue].",
    "global_clipnorm": (
        "float > 0 or None. All gradients together are scaled down to at most this norm. Only one of "
        "the three clippings can be set. Under a distribution strategy all three clip the gradients that "
        "are summed over the replicas."
    ),
    "use_ema": "bool. True: an exponential moving average of the weights is kept.",
    "ema_momentum": "float in [0, 1], the decay of that average.",
    "ema_overwrite_frequency": (
        "int >= 1 or None. Every so many steps the weights are set to their average; None: at the end "
        "of `fit`."
    ),
    "loss_scale_factor": "float > 0 or None. The loss is multiplied by it, the gradients are divided by it.",
    "gradient_accumulation_steps": (
        "int >= 2 or None. The weights are updated every so many steps, by the mean of the gradients "
        "since the last update."
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


def completed(doc: str, common: list[str]) -> str:
    """A docstring with {{name}} replaced by the entry of that argument, {{common}} by those of these names.

    {{types}} and {{raises}} are the paragraphs above.
    """
    texts = {name: _entry(name) for name in ARGUMENTS}
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


def _entry(name: str) -> str:
    """An argument in an Args section."""
    return textwrap.fill(f"{name}: {ARGUMENTS[name]}", 100, subsequent_indent="    ", break_on_hyphens=False)
