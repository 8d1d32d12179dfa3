# SPDX-License-Identifier: Apache-2.0
"""An evaluation of a checkpoint that takes a tenth of a second: python -I -S manifest_metric.py CHECKPOINT OUT

Its number says which weights it saw. Starts without site-packages: a kill point is to fall into its run, not into the
import of torch."""

import json
import sys
import time
from pathlib import Path

checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
tensors = json.loads((checkpoint / "complete.json").read_text())["tensors"]
time.sleep(0.1)
weights = sum(int(entry["hash"], 16) for entry in tensors.values()) % (1 << 40)
(out / "partial").write_text(json.dumps({"weights": weights}))
(out / "partial").rename(out / "metrics.json")
