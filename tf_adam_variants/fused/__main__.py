"""`python -m tf_adam_variants.fused build` and `... status`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from tf_adam_variants import fused
from tf_adam_variants.fused import _build


def _parse_architectures(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            "must be numbers, like 80,90, without a letter: the kernels use nothing that only one GPU has, "
            f"and 90 serves for 90a. Received: {text!r}"
        )
    return tuple(text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tf_adam_variants.fused",
        description="The fused kernels of tf_adam_variants: build them for the installed TensorFlow, or "
        "describe those that are built.",
        epilog="CXX: the C++ compiler, if not c++, g++ or clang++ on the PATH. CUDA_HOME: where "
        "bin/nvcc is, if not on the PATH or in /usr/local/cuda. TF_ADAM_VARIANTS_CACHE: where "
        "libraries are kept, if not in tf_adam_variants in XDG_CACHE_HOME or ~/.cache.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = (
        "Compile the fused kernels into the cache, where optimizers find them. It takes half a minute. Where "
        "there is CUDA's nvcc, the kernels for GPUs are compiled too."
    )
    build = commands.add_parser("build", help="compile the fused kernels", description=about)
    build.add_argument("--force", action="store_true", help="build even if they are built already")
    gpus = build.add_mutually_exclusive_group()
    gpus.add_argument("--no-cuda", action="store_true", help="without the kernels for GPUs")
    gpus.add_argument(
        "--cuda-arch",
        type=_parse_architectures,
        default=(),
        metavar="80,90",
        help="the GPUs to build for, by compute capability without the dot; later GPUs compile the kernels "
        "when they first run them. Default: %(metavar)s",
    )
    about = "Say how the fused kernels were built, or why they cannot be used; then the exit status is 1."
    commands.add_parser("status", help="say whether they can be used", description=about)
    parsed = parser.parse_args(arguments)

    if parsed.command == "status":
        print(fused.status())
        return 0 if fused.is_available() else 1
    try:
        _build.build(parsed.force, not parsed.no_cuda, parsed.cuda_arch)
    except (RuntimeError, OSError) as error:
        print(f"Not built. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
