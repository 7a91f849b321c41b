# SPDX-License-Identifier: Apache-2.0
"""What makes a trained model fit for ONNX, OpenVINO and INT8."""
