# SPDX-License-Identifier: Apache-2.0
"""The command that inspects images."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from .inspector import FIELDS, Inspector
from .reading import EXTENSIONS, find_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ALL_GOOD, SOME_ANOMALOUS, FAILED, STOPPED = 0, 1, 2, 130
EPILOG = """\
Each image gives a line: image, score (0 to 1; the threshold is 0.5 unless the part says otherwise), decision (good,
anomalous or unreadable), defects (box: left, top, right, bottom; area; both in pixels of the image), milliseconds from
file to decision, and error. Folders are searched with their sub-folders; hidden files and those without an image's
ending (Thumbs.db, .DS_Store, ._part.png) are passed over. One unreadable file never stops the others.

exit status:
  0  all images are good
  1  some are anomalous, and all could be read
  2  some could not be read, or there were none, or the command was given wrongly
  130  stopped before the first image
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"error: {message} (--help shows what can be given)\n")


def inspect_parser(prog: str, *, has_part: bool) -> _Parser:
    """Make the command's parser.

    Args:
        prog: How the command is called.
        has_part: Whether the part folder is known, and so not an argument.
    """
    parser = _Parser(
        prog=prog,
        description="Inspect images with a part folder, and tell which are anomalous and where.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not has_part:
        parser.add_argument("part", metavar="PART", help="the part folder, which holds part.json")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, and folders of images")
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="CSV, or JSON, a line per image")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the lines to a file (--watch adds to it); left out, they are printed",
    )
    parser.add_argument(
        "--heat-maps",
        metavar="FOLDER",
        help="draw heat maps there, in the layout of the images: that of part.jpg is part.jpg.png",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="call images anomalous above this score instead of the part's threshold",
    )
    parser.add_argument("--device", default="CPU", help="OpenVINO's device; left out, CPU")
    _add_watching(parser)
    return parser


def _add_watching(parser: _Parser) -> None:
    parser.add_argument(
        "--watch",
        action="store_true",
        help="inspect the images that are there, then others as they arrive, once each is complete; ends with Ctrl-C",
    )
    parser.add_argument(
        "--idle", type=float, metavar="SECONDS", help="with --watch, end when nothing has arrived for so long"
    )
    parser.add_argument(
        "--interval", type=float, default=0.2, metavar="SECONDS", help="with --watch, time between two looks (0.2)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="with --watch, how long a file that cannot be read may stay unchanged before it is called unreadable (5)",
    )


def inspect_main(
    argv: Sequence[str] | None = None, part: str | Path | None = None, prog: str = "anomalib-fractalad inspect"
) -> int:
    """Run the command.

    Args:
        argv: Its arguments; left out, the process's.
        part: The part folder; left out, it is the first argument.
        prog: How the command is called.

    Returns:
        The exit status: 0 all good, 1 some anomalous, 2 some unreadable or a wrong call.

    Raises:
        SystemExit: With 2 if an argument is wrong, with 0 after ``--help``.
    """
    parser = inspect_parser(prog, has_part=part is not None)
    given = parser.parse_args(argv)
    _check(parser, given)
    _check_output(parser, given)
    try:
        return _inspect(parser, given, part)
    except KeyboardInterrupt:
        return STOPPED


def _inspect(parser: _Parser, given: argparse.Namespace, part: str | Path | None) -> int:
    try:
        inspector = Inspector(part if part is not None else given.part, given.device, given.threshold)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        parser.error(_one_line(error))
    folder = Path(given.heat_maps).resolve() if given.heat_maps else None
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--heat-maps: {_one_line(error)}; give a folder that can be written")

    def inspect(path: Path) -> dict[str, Any]:
        return inspector.inspect(path, folder and folder / _place(path, given.images))

    def look() -> list[Path]:
        return find_images(given.images, [folder] if folder else [])

    counts, failed = dict.fromkeys(("good", "anomalous", "unreadable"), 0), False
    with ExitStack() as stack:
        try:
            write = _writer(stack, given.output, given.format, go_on=given.watch)
        except OSError as error:
            parser.error(f"--output: {_one_line(error)}")
        stack.enter_context(suppress(KeyboardInterrupt, BrokenPipeError))
        rows = _watch(stack, look, inspect, given) if given.watch else map(inspect, look())
        for row in rows:
            write(row)
            counts[row["decision"]] += 1
            failed = failed or row["error"] is not None
    if not any(counts.values()):
        print(f"error: there is no image in {', '.join(given.images)}", file=sys.stderr)
        return FAILED
    print(", ".join(f"{count} {name}" for name, count in counts.items()), file=sys.stderr)
    if failed:
        return FAILED
    return SOME_ANOMALOUS if counts["anomalous"] else ALL_GOOD


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check(parser: _Parser, given: argparse.Namespace) -> None:
    for path in map(Path, given.images):
        if given.watch and not path.is_dir():
            parser.error(f"--watch takes folders, and {path} is none")
        if not path.exists() and not path.suffix:
            parser.error(f"{path} does not exist")
        if given.heat_maps and path.resolve().is_relative_to(Path(given.heat_maps).resolve()):
            parser.error(f"{path} lies in the folder of the heat maps: choose another with --heat-maps")
    if given.idle is not None and not given.watch:
        parser.error("--idle needs --watch")
    for name in ("idle", "interval", "grace"):
        value = getattr(given, name)
        if value is not None and not 0 <= value < float("inf"):
            parser.error(f"--{name} is {value}; it must be seconds, 0 or more")
    if given.threshold is not None and not 0 <= given.threshold <= 1:
        parser.error(f"--threshold is {given.threshold}; scores lie between 0 and 1")


def _check_output(parser: _Parser, given: argparse.Namespace) -> None:
    if not given.output:
        return
    if Path(given.output).suffix.lower() in EXTENSIONS:
        parser.error(f"--output {given.output} has an image's ending: give another file")
    held = _format_of(Path(given.output))
    if held == "other":
        parser.error(f"--output {given.output} exists and holds no results of this command: give another file")
    if held and given.watch and held != given.format:
        parser.error(f"--output {given.output} holds {held}: give --format {held}, or another file")


def _format_of(file: Path) -> str | None:
    """What a file holds: csv or json, results that this command wrote; other; or none, nothing."""
    if not file.is_file() or not file.stat().st_size:
        return None
    with file.open("rb") as opened:
        begin = opened.read(100)
    begins = {"csv": ",".join(FIELDS), "json": '{"image": '}
    return next((kind for kind, text in begins.items() if begin.startswith(text.encode())), "other")


def _place(path: Path, images: Sequence[str]) -> Path:
    """Where the heat map of an image lies in their folder: no two images share a place."""
    given = [Path(image).absolute() for image in images]
    roots = [str(image if image.is_dir() else image.parent) for image in given]
    path = path.absolute()
    try:
        relative = path.relative_to(os.path.commonpath(roots))
    except ValueError:  # on several drives
        relative = Path(*(part.strip(":\\/") for part in path.parts))
    return relative.with_name(f"{relative.name}.png")


def _writer(stack: ExitStack, output: str | None, kind: str, *, go_on: bool) -> Callable[[dict[str, Any]], None]:
    """A function that writes a line."""
    is_new = True
    file: IO[str] = sys.stdout
    if output is None:
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")  # names that are no text
    else:
        path = Path(output)
        is_new = not go_on or _format_of(path) is None
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("a", encoding="utf-8", errors="backslashreplace", newline=""))
    table = csv.writer(file, lineterminator="\n")

    def write(row: dict[str, Any]) -> None:
        nonlocal is_new
        if is_new:  # what was there stays until there is something to take its place
            if output is not None:
                file.truncate(0)
            if kind == "csv":
                table.writerow(FIELDS)
            is_new = False
        if kind == "csv":
            table.writerow([json.dumps(row[name]) if name == "defects" else row[name] for name in FIELDS])
        else:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    return write


def _watch(
    stack: ExitStack,
    look: Callable[[], list[Path]],
    inspect: Callable[[Path], dict[str, Any]],
    given: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Inspect images as they arrive; one that is written anew is inspected anew.

    A file is complete if it stays as it is between two looks and can be read, or cannot for a time of grace.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # outside the main thread
            before = signal.signal(number, signal.default_int_handler)
            stack.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
    done: dict[Path, tuple[int, int]] = {}
    waiting: dict[Path, tuple[tuple[int, int], float]] = {}  # state, and when it was first seen
    last = time.monotonic()
    while given.idle is None or time.monotonic() - last < given.idle:
        for path in look():
            try:
                stat = path.stat()
            except OSError:  # moved away meanwhile
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            if done.get(path) == state:
                continue
            last = now = time.monotonic()
            seen, since = waiting.get(path, (None, now))
            if seen != state:
                waiting[path] = (state, now)
                continue
            row = inspect(path)
            last = time.monotonic()
            if row["decision"] == "unreadable" and (now - since < given.grace or not path.exists()):
                continue
            done[path] = state
            del waiting[path]
            yield row
        time.sleep(given.interval)
