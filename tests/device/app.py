"""An app on the device, in the system's Python: asks models without end, and keeps a report of how it goes.

    python3 app.py REPORT ENDPOINT MODEL...

Each model's first answer to an input of ones is what all later ones must be. The report is one JSON document:
for each model how many answers were right and wrong, and the errors by reason.
"""

import json
import os
import sys
import time

import numpy as np

from edged import Client
from edged.errors import EdgedError

PERIOD_S = 0.02
"""A camera's pace."""


def main(report_path: str, endpoint: str, *models: str) -> None:
    report = {name: {"right": 0, "wrong": 0, "errors": {}} for name in models}
    inputs: dict = {}
    wanted: dict = {}
    with Client(endpoint, timeout=5) as client:
        while True:
            begin = time.monotonic()
            for name in models:
                counts = report[name]
                try:
                    if name not in inputs:
                        inputs[name] = {
                            each["name"]: np.ones([max(1, d) for d in each["shape"]], np.float32)
                            for each in client.model_metadata(name)["inputs"]
                        }
                    result = client.infer(name, inputs[name])
                    answer = {each: np.array(result[each]) for each in sorted(result)}
                except EdgedError as e:
                    counts["errors"][e.reason] = counts["errors"].get(e.reason, 0) + 1
                    continue
                first = wanted.setdefault(name, answer)
                same = all(np.array_equal(first[each], answer[each]) for each in first)
                counts["right" if same else "wrong"] += 1
            with open(report_path + ".new", "w") as f:
                json.dump(report, f)
            os.rename(report_path + ".new", report_path)
            time.sleep(max(0.0, PERIOD_S - (time.monotonic() - begin)))


if __name__ == "__main__":
    main(*sys.argv[1:])
