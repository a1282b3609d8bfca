"""Names become files; a wrong name lists the right ones."""

import re

import pytest

from vlmedge.errors import UnknownNameError
from vlmedge.shelves.registry import DEVICES, ENGINES, FAMILIES, SCHEMES, experimental


@pytest.mark.parametrize("registry", [FAMILIES, SCHEMES, ENGINES, DEVICES], ids=lambda r: r.folder)
def test_registry_imports_every_file(registry) -> None:  # type: ignore[no-untyped-def]
    assert registry.names()
    for name in registry.names():
        assert registry[name] is not None


def test_registry_lists_the_nearest_and_the_known() -> None:
    known = re.escape(", ".join(FAMILIES.names()))
    with pytest.raises(UnknownNameError, match=f"did you mean 'blip'. choose from {known}"):
        FAMILIES["blip3"]


def test_engines_that_no_device_has_run_say_so() -> None:
    assert experimental() == ["ort_tensorrt", "ort_tensorrt_rtx"]
    assert ENGINES.literal("ort", "EXPERIMENTAL", False) is False
    with pytest.raises(UnknownNameError, match=r"runtimes/ort.py: it has no literal EXPERIMENTAL"):
        ENGINES.literal("ort", "EXPERIMENTAL")


def test_literals_are_read_without_import() -> None:
    assert FAMILIES.literal("clip", "ARCHITECTURES") == ("CLIPModel",)
    assert FAMILIES.literal("blip2", "ALIASES")["blip2"] == "Salesforce/blip2-opt-2.7b"
