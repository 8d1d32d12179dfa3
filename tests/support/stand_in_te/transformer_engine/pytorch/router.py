# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py. Only there to be imported."""

fused_compute_score_for_moe_aux_loss = None
fused_moe_aux_loss = None
fused_topk_with_score_function = None
