# SPDX-License-Identifier: Apache-2.0
"""Names of the loggers that a training speaks through."""

LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")  # which one it takes varies
