"""The rest is in pyproject.toml.

TFAV_BUILD_OPS=1 pip wheel --no-build-isolation .    # a wheel with the fused kernels
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py


def with_library():
    """Make the arguments of `setup` for a wheel with the kernels, for one TensorFlow version and platform."""
    import tensorflow as tf
    from setuptools.command.bdist_wheel import bdist_wheel

    class Platform(Distribution):
        def has_ext_modules(self):
            return True

        def parse_config_files(self, *args, **kwargs):
            super().parse_config_files(*args, **kwargs)
            self.metadata.version += f"+tf{tf.__version__}"
            others = [needed for needed in self.install_requires if not needed.startswith("tensorflow")]
            self.install_requires = [f"tensorflow=={tf.__version__}", *others]
            self.metadata.install_requires = self.install_requires

    class Wheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]  # for any Python

    class Build(build_py):
        def run(self):
            super().run()
            if not self.editable_mode:  # a checkout finds its library in the cache
                sys.path.insert(0, str(Path(__file__).resolve().parent))
                from tf_adam_variants.fused import _build

                shutil.copytree(
                    _build.build(),
                    Path(self.build_lib, "tf_adam_variants", "fused", "lib"),
                    dirs_exist_ok=True,
                )

    return {"distclass": Platform, "cmdclass": {"bdist_wheel": Wheel, "build_py": Build}}


setup(**(with_library() if os.environ.get("TFAV_BUILD_OPS") == "1" else {}))
