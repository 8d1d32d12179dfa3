# SPDX-License-Identifier: Apache-2.0
"""Read by lmms-eval's LMMS_EVAL_PLUGINS: name of a model, which is its module here, and name of its class."""

AVAILABLE_MODELS = {"eve": "Eve"}
