# SPDX-License-Identifier: Apache-2.0
"""Tasks that the plugin brings to lmms-eval, one folder each."""
