# SPDX-License-Identifier: Apache-2.0
"""A plugin of lmms-eval: released EVE folders as its model `eve`, and easy-VQA's held-out questions as a local task.

    python -m megatron_eve.evaluation.lmms_eval FOLDER --tasks easy_vqa --out OUT

`asking.py` does the work and does not need lmms-eval; `models/eve.py` is the adapter that lmms-eval loads. See
docs/evaluation.md."""
