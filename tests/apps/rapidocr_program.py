"""What RapidOCR reads in each picture named: the lines, how sure it is, and where they stand."""

import json
import sys

from tests.apps.swap import swap_if_asked

swap_if_asked()

from rapidocr import RapidOCR  # noqa: E402 - after the session was put in place

engine = RapidOCR()
found = {}
for path in sys.argv[1:]:
    result = engine(path)
    found[path] = [list(result.txts), [float(score) for score in result.scores], result.boxes.tolist()]
print(json.dumps(found))
