# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval's LMMS_EVAL_PLUGINS reads: name of a model, which is its module here, and name of its class."""

AVAILABLE_MODELS = {"eve": "Eve"}
