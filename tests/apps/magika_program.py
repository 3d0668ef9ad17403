"""What Magika says of each file named: its label, and the score with every digit."""

import json
import sys
from pathlib import Path

from tests.apps.swap import swap_if_asked

swap_if_asked()

from magika import Magika  # noqa: E402 - after the session was put in place

magika = Magika()
paths = [Path(argument) for argument in sys.argv[1:]]
one_by_one = [magika.identify_path(path) for path in paths]
together = magika.identify_paths(paths)
print(
    json.dumps(
        {
            kind: {
                path.name: [str(result.output.label), result.score]
                for path, result in zip(paths, results, strict=True)
            }
            for kind, results in (("one by one", one_by_one), ("together", together))
        }
    )
)
