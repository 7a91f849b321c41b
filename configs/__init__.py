# SPDX-License-Identifier: Apache-2.0
"""The package's config files; ``python -m anomalib_fractalad config`` lists them."""
