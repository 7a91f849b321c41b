# SPDX-License-Identifier: Apache-2.0
"""What a training needs beside its model: checkpoints, resuming, the check of images."""
