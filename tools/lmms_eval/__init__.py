# SPDX-License-Identifier: Apache-2.0
"""A plugin of lmms-eval: released EVE folders as its model `eve`, and easy-VQA's held-out questions as a local task.

    python -m tools.lmms_eval FOLDER --tasks easy_vqa --out OUT      (sets LMMS_EVAL_PLUGINS=tools.lmms_eval)

`asking.py` does the work and does not need lmms-eval; `models/eve.py` is the adapter that lmms-eval loads. See
docs/evaluation.md."""
