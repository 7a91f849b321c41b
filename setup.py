# SPDX-License-Identifier: Apache-2.0
"""What setup.cfg cannot say: the config files are part of the package, but lie at the top of the repository."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["anomalib_fractalad*"]), "anomalib_fractalad.configs"],
    package_dir={"anomalib_fractalad.configs": "configs"},
)
