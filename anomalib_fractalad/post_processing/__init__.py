# SPDX-License-Identifier: Apache-2.0
"""Thresholds and normalization of scores and anomaly maps."""

from .false_alarms import FalseAlarmThreshold
from .order_preserving import OrderPreservingPostProcessor

__all__ = ["FalseAlarmThreshold", "OrderPreservingPostProcessor"]
