# SPDX-License-Identifier: Apache-2.0
"""Comparison of models, and measurements of speed."""
