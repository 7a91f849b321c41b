# SPDX-License-Identifier: Apache-2.0
"""Breaks the package in many ways, one at a time, and runs the tests that should notice.

python tests/mutations.py [--write] [--jobs N] [PART OF A NAME ...]

The mutations are in mutations.yaml. Each replaces a piece of a function's source by another in a fork of this process;
no file is changed. A piece that does not occur exactly once, or a test that fails on the intact package, ends the run.
With --write, the outcome goes to mutations.md, where rows of mutations that were not run stay as they are.
"""

import argparse
import inspect
import os
import shlex
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import onnxruntime  # noqa: F401  # what the tests import is imported once, for all forks
import pytest
import torch
import yaml
from anomalib.deploy import OpenVINOInferencer  # noqa: F401
from anomalib.engine import Engine  # noqa: F401

import anomalib_fractalad  # noqa: F401

TESTS = Path(__file__).parent
OUTCOME = TESTS / "mutations.md"
HEADER = """# Mutations

What `python tests/mutations.py --write` found: each row is a way to break the package, and a test that fails then.

| Model | Mutation | Function | Noticed by |
| --- | --- | --- | --- |
"""


class Mutation(NamedTuple):
    """A piece of a function's source and what takes its place."""

    model: str
    name: str
    function: str
    old: str
    new: str
    tests: str


def read_mutations() -> list[Mutation]:
    content = yaml.safe_load((TESTS / "mutations.yaml").read_text())
    return [
        Mutation(model, name, function, old, new, *(own or [group["tests"]]))
        for model, group in content.items()
        for function, changes in group["functions"].items()
        for name, old, new, *own in changes
    ]


def key(mutation: Mutation) -> str:
    return f"| {mutation.model} | {mutation.name} |"


def read_outcome() -> dict[str, str]:
    """The rows of an earlier run by their keys."""
    known = {key(mutation) for mutation in read_mutations()}
    lines = OUTCOME.read_text().splitlines() if OUTCOME.exists() else []
    return {start: line for line in lines if (start := "|".join(line.split("|")[:3]) + "|") in known}


def changed_function(mutation: Mutation) -> tuple[Any, str, Any, Any]:
    """The owner of a function, if it is a method, its name, the function, and the changed one."""
    module, _, path = mutation.function.partition(":")
    function = resolve_name(mutation.function)
    source = textwrap.dedent(inspect.getsource(function))
    if (count := source.count(mutation.old)) != 1:
        sys.exit(f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.function}; mend mutations.yaml")
    owner_path, _, name = path.rpartition(".")
    owner = resolve_name(f"{module}:{owner_path}") if owner_path else None
    # Within a function that has __class__, super() without arguments works.
    body = textwrap.indent(source.replace(mutation.old, mutation.new), "    ")
    namespace: dict[str, Any] = {}
    code = compile(f"def make(__class__):\n{body}\n    return {name}", f"<{mutation.name}>", "exec")
    exec(code, vars(sys.modules[module]), namespace)  # noqa: S102
    return owner, name, function, namespace["make"](owner)


def mutate(mutation: Mutation) -> None:
    """Put a changed function in the place of the intact one, wherever it is known."""
    owner, name, function, changed = changed_function(mutation)
    if owner is not None:
        setattr(owner, name, changed)
        return
    for module in list(sys.modules.values()):
        if module.__name__.startswith("anomalib_fractalad") and vars(module).get(name) is function:
            setattr(module, name, changed)


class Failures:
    """Notes the tests that fail."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid.rpartition("/")[2])


def run_tests(tests: str, mutation: Mutation | None) -> list[str]:
    """Run tests in a fork, of a broken package or of the intact one; gives those that fail."""
    with tempfile.TemporaryDirectory() as folder:
        told, printed = Path(folder) / "failures", Path(folder) / "printed"
        child = os.fork()
        if child == 0:
            try:
                output = os.open(printed, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                if mutation is not None:
                    mutate(mutation)
                failures = Failures()
                file, *options = shlex.split(tests)
                options += ["-n0", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
                code = pytest.main([str(TESTS / file), *options], plugins=[failures])
                if code in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
                    told.write_text("\n".join(failures.names))
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(child, 0)
        if not told.exists():
            sys.exit(f"{tests} did not run:\n{printed.read_text()[-3000:]}")
        return told.read_text().split("\n") if told.stat().st_size else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names of mutations; left out, all are run")
    parser.add_argument("--write", action="store_true", help=f"write the outcome to {OUTCOME.name}")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mutations = [
        mutation
        for mutation in read_mutations()
        if not arguments.names or any(part in f"{mutation.model}: {mutation.name}" for part in arguments.names)
    ]
    for mutation in mutations:
        changed_function(mutation)
    rows, survivors = read_outcome(), 0

    def run(mutation: Mutation | None, tests: str) -> list[str]:
        return run_tests(tests, mutation)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        every = list(dict.fromkeys(mutation.tests for mutation in mutations))
        for tests, failures in zip(every, pool.map(lambda tests: run(None, tests), every), strict=True):
            if failures:
                sys.exit(f"{tests}: {failures[0]} fails on the intact package")
        outcomes = pool.map(lambda mutation: run(mutation, mutation.tests), mutations)
        for mutation, failures in zip(mutations, outcomes, strict=True):
            survivors += not failures
            noticed = f"`{failures[0]}`" if failures else "**SURVIVED**"
            function = mutation.function.removeprefix("anomalib_fractalad.")
            rows[key(mutation)] = f"{key(mutation)} `{function}` | {noticed} |"
            print(rows[key(mutation)], flush=True)
    if arguments.write:
        known = [rows[key(mutation)] for mutation in read_mutations() if key(mutation) in rows]
        OUTCOME.write_text(HEADER + "".join(f"{row}\n" for row in known))
    sys.exit(f"{survivors} of {len(mutations)} mutations survived" if survivors else 0)


if __name__ == "__main__":
    main()
