"""The array types that all modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]


Scores = NDArray[np.float32]
Ids = NDArray[np.int64]
