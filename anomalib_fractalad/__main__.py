# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_fractalad``: tells what is registered and in force, and where the config files are."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from anomalib_fractalad.registration import DATA_MODULES, MODELS

PACKAGE = Path(__file__).parent


def status() -> str:
    """Tell what is registered with anomalib, and which repairs are in force.

    Returns:
        Lines of text.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # not the user's doing
    import anomalib.data  # noqa: PLC0415
    import anomalib.models  # noqa: PLC0415

    from anomalib_fractalad.repairs import REPAIRS, state  # noqa: PLC0415

    lines = [f"anomalib-fractalad {version('anomalib-fractalad')} with anomalib {version('anomalib')}", ""]
    for kind, names, package in (("models", MODELS, anomalib.models), ("data", DATA_MODULES, anomalib.data)):
        found = [name if hasattr(package, name) else f"{name} (not registered)" for name in names]
        lines.append(f"{kind}: {', '.join(found)}")
    lines += ["", "repairs of anomalib:"]
    for repair in REPAIRS:
        lines += [f"  {repair.name}: {state(repair)}", f"    {repair.defect} Versions {repair.versions}."]
    return "\n".join(lines)


def config_files() -> dict[str, Path]:
    """Find the config files: part of the installed package, or at the top of a clone.

    Returns:
        Their paths by name, without ``.yaml``.
    """
    installed = PACKAGE / "configs"
    folder = installed if installed.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config(name: str | None = None) -> str:
    """Tell the path of a config file.

    Args:
        name: Its name, with or without ``.yaml``. Without one, all names are told, each with what it is for.

    Returns:
        The path, or lines of text.

    Raises:
        ValueError: If there is none of that name.
    """
    files = config_files()
    if name is None:
        width = max(map(len, files), default=0)
        first_lines = {file: path.read_text(encoding="utf-8").partition("\n")[0] for file, path in files.items()}
        return "\n".join(f"{file:{width}}  {line.lstrip('# ')}" for file, line in first_lines.items())
    if name.removesuffix(".yaml") not in files:
        msg = f"there is no config {name!r}; take one of {', '.join(files)}"
        raise ValueError(msg)
    return str(files[name.removesuffix(".yaml")])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help shows what can be given)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m anomalib_fractalad", description="Information on this installation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{status,config}")
    text = "tell what is registered with anomalib, and which repairs of it are in force"
    commands.add_parser("status", help=text, description=text)
    text = "tell the path of a config file, for anomalib train --config PATH"
    command = commands.add_parser("config", help=text, description=text)
    command.add_argument("name", nargs="?", help="name of the config; left out, all are listed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; left out, the process's.

    Returns:
        The exit status.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        print(status() if given.command == "status" else config(given.name))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
