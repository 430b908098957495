"""Settings for all tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # several test processes share the cores: spinning OpenMP threads would slow all of them down
