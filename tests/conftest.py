"""Settings of all tests.

Generated examples are the same in each run, so that a red run is red for a reason that is in the change.
`EDGED_TEST_EXPLORE=1` lets hypothesis look for new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("explore" if os.environ.get("EDGED_TEST_EXPLORE") else "same")
