# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_fractalad status``: what is registered with anomalib, and which repairs are in force."""

import logging
import sys
import warnings
from importlib.metadata import version

from anomalib_fractalad.registration import DATA_MODULES, MODELS

USAGE = "usage: python -m anomalib_fractalad status"


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


def main() -> int:
    """Run the command.

    Returns:
        The exit status.
    """
    if sys.argv[1:] != ["status"]:
        print(USAGE, file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING)
    print(status())
    return 0


if __name__ == "__main__":
    sys.exit(main())
