"""The fused kernels: one pass over a model's variables instead of many. They are optional. To build them:

python -m tf_adam_variants.fused build
"""

from tf_adam_variants.fused import _library
from tf_adam_variants.fused._split_step import split_step as split_step


def is_available() -> bool:
    """Load the fused kernels. Return whether they are built and can be loaded.

    Examples:
        >>> is_available() in (True, False)
        True
    """
    return _library.load() is not None


def status() -> str:
    """Describe the fused kernels, a line per fact: how they were built, or why they cannot be used.

    Examples:
        >>> print(status())  # doctest: +ELLIPSIS
        available: ...
        TensorFlow: 2...
        cache: ...
    """
    import ctypes

    import tensorflow as tf

    from tf_adam_variants.fused import _build

    ops, library, build, reason = _library.find_library()
    lines = {"available": "yes" if ops else f"no. {reason}"}
    if build is not None:
        instruction_set = ctypes.CDLL(str(library)).tfav_instruction_set
        instruction_set.restype = ctypes.c_char_p
        lines |= {
            "library": str(library),
            "built": f"{build.time} by {build.compiler}",
            "flags": build.flags,
            "GPU kernels": build.cuda,
            "GPU": _library.gpu_reason() or "ready",
            "instruction set": instruction_set().decode(),
        }
    lines |= {"TensorFlow": tf.__version__, "cache": str(_library.cache())}
    try:
        command = _build.compiler()
        lines["compiler"] = f"{' '.join(command)}, {_build.version(command)}"
    except (RuntimeError, OSError) as error:
        lines["compiler"] = f"none. {error}"
    return "\n".join(f"{name}: {text}" for name, text in lines.items())
