"""`python -m tf_adam_variants.fused build` and `... status`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from tf_adam_variants import fused
from tf_adam_variants.fused import _build, _cache


def _architectures(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            "must be numbers, like 80,90, without a letter: the kernels use nothing that only one GPU has, "
            f"and 90 serves for 90a. Received: {text!r}"
        )
    return tuple(text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tf_adam_variants.fused",
        description="The compiled op of tf_adam_variants: build it for the installed TensorFlow, or say what "
        "there is.",
        epilog="CXX: the C++ compiler, if not c++, g++ or clang++ on the PATH. CUDA_HOME: where "
        "bin/nvcc is, if not on the PATH or in /usr/local/cuda. TF_ADAM_VARIANTS_CACHE: where "
        "libraries are kept, if not in tf_adam_variants in XDG_CACHE_HOME or ~/.cache.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = (
        "Compile the op, which takes half a minute, into the cache, where optimizers find it. Where there is "
        "CUDA's nvcc, the kernels for GPUs are compiled too."
    )
    build = commands.add_parser("build", help="compile the op", description=about)
    build.add_argument("--force", action="store_true", help="even if it is built already")
    build.add_argument(
        "--keep",
        action="store_true",
        help=f"leave the libraries that nothing has loaded for {_cache.UNUSED_DAYS} days; they are "
        "removed otherwise",
    )
    gpus = build.add_mutually_exclusive_group()
    gpus.add_argument("--no-cuda", action="store_true", help="without the kernels for GPUs")
    gpus.add_argument(
        "--cuda-arch",
        type=_architectures,
        default=(),
        metavar="80,90",
        help="for which GPUs, by compute capability without the dot; later ones compile what they need when "
        "they first run it. Default: %(metavar)s",
    )
    about = "Say whether the op can be used, how it was built, or why not. The exit status is 1 if it cannot."
    commands.add_parser("status", help="say whether it can be used", description=about)
    parsed = parser.parse_args(arguments)

    if parsed.command == "status":
        print(fused.status())
        return 0 if fused.is_available() else 1
    try:
        _build.build(parsed.force, not parsed.no_cuda, parsed.cuda_arch)
        if not parsed.keep:
            _cache.remove_unused()
    except (RuntimeError, OSError) as error:
        print(f"Not built. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
