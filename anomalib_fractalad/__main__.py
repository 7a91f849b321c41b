# SPDX-License-Identifier: Apache-2.0
"""``anomalib-fractalad``, or ``python -m anomalib_fractalad``: builds, inspects, compares, and tells what is there."""

import argparse
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from anomalib_fractalad.registration import DATA_MODULES, MODELS

PACKAGE = Path(__file__).parent
PROGRAM = "anomalib-fractalad"
EXAMPLES = ("fabric", "metal_plate", "molded_part")


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


def _state_file(folder: Path) -> Path:
    return folder / "work" / "state.json"


def build_status(folder: Path) -> str:
    """Tell how far the build of a part is.

    Args:
        folder: Folder of the part.

    Returns:
        Lines of text.

    Raises:
        ValueError: If it holds no build.
    """
    file = _state_file(folder)
    if not file.is_file():
        msg = f"{folder} holds no build; give the folder that was named to build as --output"
        raise ValueError(msg)
    content = json.loads(file.read_text(encoding="utf-8"))
    choice = content.get("choice", {})
    lines = [f"images: {content['request']['good']}"]
    for name, row in choice.get("rows", {}).items():
        quality = row.get("outcome", {}).get("quality")
        known = row.get("failed") or row.get("note") or ("tried" if quality is None else f"{quality:.3f}")
        lines.append(f"  {name}: {known}")
    if "chosen" in choice:
        lines.append(f"chosen: {choice['chosen']}, {choice['why']}")
    done = {"trained": "training", "exported": "export", "report written": "done"}
    lines += [f"{what}: {'yes' if key in content else 'not yet'}" for what, key in done.items()]
    return "\n".join([*lines, "" if "done" in content else "the same build command goes on"]).rstrip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help shows what can be given)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="From a folder of good images to a model at the line.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,inspect,compare,status,config}")
    _add_build(commands)
    text = "look for defects in images with a part that was built"
    commands.add_parser("inspect", help=text, description=text, add_help=False)
    text = "train, test, export and time models side by side"
    commands.add_parser("compare", help=text, description=text, add_help=False)
    text = "tell how far a build is, or what is registered with anomalib and which repairs of it are in force"
    command = commands.add_parser("status", help=text, description=text)
    command.add_argument("part", nargs="?", type=Path, help="folder of a part; left out, the installation is told")
    text = "tell the path of a config file, for anomalib train --config PATH"
    command = commands.add_parser("config", help=text, description=text)
    command.add_argument("name", nargs="?", help="name of the config; left out, all are listed")
    return parser


def _add_build(commands: Any) -> None:
    text = "choose, train and export a model from a folder of good images"
    command = commands.add_parser(
        "build",
        help=text,
        description=f"{text.capitalize()}. A command that was stopped goes on when it is given again.",
        epilog=f"example: {PROGRAM} build images/good --output part1 --bad images/bad --minutes 10",
    )
    add = command.add_argument
    text = f"folder of good images, with sub-folders; or made images to try it with: {', '.join(EXAMPLES)}"
    add("good", type=Path, metavar="GOOD", help=text)
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the part is written")
    text = "bad images; the report shows what is found of them (a sub-folder named good is left out)"
    add("--bad", type=Path, metavar="FOLDER", help=text)
    add("--minutes", type=float, default=30, metavar="N", help="time to choose and train in, about (default: 30)")
    text = "share of good images that may raise an alarm (default: 0.01, or what the images can promise)"
    add("--false-alarms", type=float, metavar="SHARE", help=text)
    add("--roi", type=Path, metavar="FILE", help="mask: what is black is neither trained on, scored nor shown")
    text = (
        "finds the part's name in an image's path; images of one part stay together (default: told by names and looks)"
    )
    add("--group", metavar="REGEX", help=text)
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result (default: 0)")
    text = "false-alarms: from good images alone (default); f1: best F1 score on good and bad images"
    add("--threshold", choices=["false-alarms", "f1"], default="false-alarms", help=text)
    add("--restart", action="store_true", help="build anew what FOLDER holds already")
    more = command.add_argument_group("models")
    add = more.add_argument
    add("--candidates", type=Path, metavar="FILE", help="candidates in place of the package's, in the same form")
    add("--backbone", metavar="NAME", help="teacher of all candidates, a CNN of timm (default: tf_efficientnet_lite0)")
    add("--weights", type=Path, metavar="FILE", help="the teacher's weights, a local timm checkpoint")
    add("--no-pre-trained", dest="pre_trained", action="store_false", help="teacher with random weights")
    add("--accelerator", default="auto", metavar="NAME", help="where models train: auto, cpu, gpu (default: auto)")
    text = "share of whole trainings to make, in place of what the time allows; makes a build repeatable elsewhere"
    add("--effort", type=float, metavar="SHARE", help=text)
    add("--no-int8", dest="int8", action="store_false", help="leave the INT8 model out")


def _example(category: str) -> dict[str, Path]:
    """Make good and bad images of a category of SurfaceDefects, below datasets/SurfaceDefects."""
    from anomalib_fractalad.data import SurfaceDefects  # noqa: PLC0415

    data = SurfaceDefects(category=category)
    data.prepare_data()
    folder = Path(data.root) / category
    return {"good": folder / "train" / "good", "bad": folder / "test"}


def _build(given: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # not the user's doing
    print("starting ...", flush=True)
    options = {name: value for name, value in vars(given).items() if name != "command" and value is not None}
    try:
        if str(given.good) in EXAMPLES and not given.good.exists():
            options |= _example(str(given.good)) if given.bad is None else {"good": _example(str(given.good))["good"]}
        from anomalib_fractalad.build import build_part  # noqa: PLC0415

        build_part(**options)
    except KeyboardInterrupt:
        begun = _state_file(given.output).exists()
        told = f", and {PROGRAM} status {shlex.quote(str(given.output))} tells how far it is" if begun else ""
        print(f"\nstopped; the same command goes on{told}")
        return 130
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; left out, the process's.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["inspect"]:
        from anomalib_fractalad.inspection import inspect_main  # noqa: PLC0415

        return int(inspect_main(words[1:], prog=f"{PROGRAM} inspect"))
    if words[:1] == ["compare"]:
        from anomalib_fractalad.benchmark.__main__ import main as compare  # noqa: PLC0415

        compare(words[1:], f"{PROGRAM} compare")
        return 0
    parser = _parser()
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING)
    try:
        if given.command == "build":
            return _build(given)
        if given.command == "config":
            print(config(given.name))
        else:
            print(status() if given.part is None else build_status(given.part))
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
