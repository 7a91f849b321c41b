# SPDX-License-Identifier: Apache-2.0
"""Comparison of models side by side: quality, cost and speed."""
