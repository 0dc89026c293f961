"""Settings that hold for every test: one torch thread, no hub, firm hypothesis runs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

# Workers share the cores; several threads each would be slower, and the sums of a test's oracle
# would depend on the machine.
torch.set_num_threads(1)

# A loaded machine must not fail a test by its clock; CI must not fail by luck.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
