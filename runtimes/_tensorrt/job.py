"""What one engine is built from, for and with: all that takes part in a build takes it whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmedge.bundle import Bundle
from vlmedge.parity.probe import Probe
from vlmedge.progress import Progress
from vlmedge.shelves.build_options import BuildOptions
from vlmedge.spec import Component

from .._cuda import Cuda
from . import versions as api
from .operators import Version
from .profiles import Profile, profiles


@dataclass(frozen=True, slots=True)
class Job:
    """One engine to be built.

    Attributes:
        bundle: The bundle with the component.
        component: Which.
        trt: TensorRT.
        cuda: The GPU.
        options: How it is asked for.
        probe: Inputs that the engine is tried on.
        progress: Watches.
    """

    bundle: Bundle
    component: Component
    trt: Any
    cuda: Cuda
    options: BuildOptions
    probe: Probe
    progress: Progress

    @property
    def version(self) -> Version:
        """TensorRT's."""
        return api.version(self.trt)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The sizes that it is built for."""
        return profiles(self.bundle.spec, self.component, self.options.axes)

    def note(self, text: str) -> None:
        """Tell who watches something of this component."""
        self.progress.note(f"{self.component.name}: {text}")
