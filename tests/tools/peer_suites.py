"""The suites of Keras, KerasHub and KerasTuner, with an optimizer of this package in the place of Keras's.

    git clone --branch v3.15.1 --depth 1 https://github.com/keras-team/keras
    python tests/tools/peer_suites.py keras AdamW LAMB
    python tests/tools/peer_suites.py keras QHAdamW --replace Adam --files keras/src/callbacks

The first argument is a clone of keras, keras-hub or keras-tuner at the version that is installed; its tests
import the package of the clone. pytest runs the files in a process of its own, first as they are. Tests that
pass and create an optimizer of `--replace` run again with each given optimizer, which replaces those classes
in all modules of Keras, and their names in `keras.optimizers.get`. The program prints a row for each file,
and every test that ends in another way. With `--like-sgd`, tests can also expect the numbers of SGD: without
epsilon, decay and trust ratio, all optimizers of this package take its steps along a constant gradient.
docs/peer_suites.md explains the results.

This file is also the plugin of pytest that replaces the classes and writes down the result of each test.
"""

import argparse
import collections
import functools
import inspect
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIMIZERS = ("AdamW", "QHAdam", "QHAdamW", "LAMB")
REPLACED = ("Adam", "AdamW", "Lamb", "SGD", "RMSprop", "Adagrad")
# Patterns of the files whose tests train or save models, by the folder of each package.
FILES = {
    "keras/src": """callbacks trainers/trainer_test.py saving legacy/saving export/saved_model_test.py
        backend/tensorflow/*_test.py optimizers/*optimizer*_test.py optimizers/adam_test.py
        optimizers/adamw_test.py optimizers/lamb_test.py""",
    "keras_hub/src/models": """task_test.py bert/*classifier_test.py bert/*masked_lm_test.py
        gpt2/*causal_lm_test.py resnet/*classifier_test.py segformer/*segmenter_test.py""",
    "keras_tuner": "engine/*tuner*_test.py tuners/*_test.py integration_tests/*_test.py",
}
SETTINGS = "PEER_SUITES"  # the environment variable that tells the plugin what to do


# -- the plugin: in the process of pytest --------------------------------------------------------------------

created = 0  # optimizers of the classes in question, since the test began


def put(ours, names):
    """Our class wherever Keras has one of these, and the classes that were there."""
    import keras
    from keras.src import optimizers

    theirs = [getattr(keras.optimizers, name) for name in names]
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "keras"]:
        for name, value in list(vars(module).items()):
            if ours and any(value is cls for cls in theirs):
                setattr(module, name, ours)
    for name in names if ours else ():
        optimizers.ALL_OBJECTS_DICT[name.lower()] = ours
    return theirs


def step_like_sgd(ours):
    """A step along a constant gradient becomes the step of SGD. Arguments that only SGD has are left out."""
    init, known = ours.__init__, inspect.signature(ours.__init__)
    defaults = {"weight_decay": 0.0, "epsilon": 1e-30, "exclude_from_layer_adaptation": ["."]}

    @functools.wraps(init)
    def with_defaults(self, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name in known.parameters}
        free = known.parameters.keys() - known.bind(self, *args, **kwargs).arguments.keys()
        init(self, *args, **kwargs, **{name: value for name, value in defaults.items() if name in free})

    ours.__init__ = with_defaults


def count(classes):
    """Count the optimizers of exactly these classes."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    init = BaseOptimizer.__init__

    @functools.wraps(init)
    def init_and_count(self, *args, **kwargs):
        global created
        created += type(self) in classes
        init(self, *args, **kwargs)

    BaseOptimizer.__init__ = init_and_count


def pytest_configure(config):
    import tf_adam_variants as tav

    told = json.loads(os.environ[SETTINGS])
    ours = told["optimizer"] and getattr(tav, told["optimizer"])
    theirs = put(ours, told["replace"])
    count([ours] if ours else theirs)
    if ours and told["like_sgd"]:
        step_like_sgd(ours)


def pytest_runtest_setup(item):
    global created
    created = 0


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr or ""))
        why = " ".join([line.strip() for line in crash.splitlines() if line.strip()])[:400]
        line = {"test": report.nodeid, "outcome": report.outcome, "created": created, "why": why}
        with open(json.loads(os.environ[SETTINGS])["results"], "a") as file:
            file.write(json.dumps(line) + "\n")


# -- the program ---------------------------------------------------------------------------------------------


def run(options, tests, optimizer):
    """The result of each test. The last one written down counts: an error while a test ends."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        results.touch()
        told = {name: getattr(options, name) for name in ("replace", "like_sgd")}
        told |= {"optimizer": optimizer, "results": str(results)}
        paths = [str(options.clone), *map(str, Path(__file__).resolve().parents[0:3:2])]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = os.environ | {"KERAS_BACKEND": "tensorflow", SETTINGS: json.dumps(told)}
        environment |= {"PYTHONPATH": os.pathsep.join(paths)}
        pytest = [sys.executable, "-m", "pytest", "-p", "peer_suites", "-p", "no:cacheprovider"]
        command = [*pytest, *options.pytest, *tests]
        code = subprocess.run(command, cwd=options.clone, env=environment, stdout=sys.stderr).returncode
        if code > 1:
            print(f"pytest with {optimizer or REPLACED} ended with {code}", file=sys.stderr)
        return {line["test"]: line for line in map(json.loads, results.read_text().splitlines())}


def print_table(before, after, optimizer):
    """A row for each file, and the tests that end in another way."""
    rows, differ = collections.defaultdict(collections.Counter), []
    for test, theirs in before.items():
        row = rows[test.split("::")[0]]
        row.update([f"{theirs['outcome']} before"])
        if test in after:
            ours = after[test]["outcome"]
            ours = "not made" if ours == "passed" and not after[test]["created"] else ours
            row.update(["replaced", ours])
            if ours != "passed":
                differ.append(f"- {test}: {ours}: {after[test]['why']}")
    first = [f"{outcome} before" for outcome in ("passed", "failed", "skipped")]
    columns = [*first, "replaced", "passed", "failed", "not made"]
    print(f"\n{optimizer}\n\n| file | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    print("\n" + "\n".join(differ), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=lambda path: Path(path).resolve())
    parser.add_argument("optimizers", nargs="+", choices=OPTIMIZERS)
    parser.add_argument("--replace", nargs="+", default=REPLACED, help="classes of keras.optimizers")
    parser.add_argument("--files", nargs="+", help="files or folders with tests, relative to the clone")
    parser.add_argument("--like-sgd", action="store_true", help="without decay, epsilon and trust ratio")
    parser.add_argument("--pytest", type=shlex.split, default=[], help="its arguments: --pytest='-k fit'")
    options = parser.parse_args()
    known = [(options.clone / folder, pattern) for folder, text in FILES.items() for pattern in text.split()]
    files = [str(path) for folder, pattern in known for path in sorted(folder.glob(pattern))]
    if not files:
        parser.error(f"not a clone of keras, keras-hub or keras-tuner: {options.clone}")
    before = run(options, options.files or files, None)
    tests = [test for test, one in before.items() if one["outcome"] == "passed" and one["created"]]
    for optimizer in options.optimizers if tests else ():
        lost = {test: {"outcome": "failed", "why": "no result"} for test in tests}
        print_table(before, lost | run(options, tests, optimizer), optimizer)


if __name__ == "__main__":
    main()
