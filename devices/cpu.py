"""Computers without a GPU."""

from __future__ import annotations

from vlmedge.contracts import Device

DEVICE = Device("x86-64 or Arm CPU", engines=("ort",))
