"""Whether this machine saves power now: it runs on its battery, or in its slowest power mode.

Read below a root folder, as a machine is a folder of files. Source: the kernel's
Documentation/ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

from vlmedge.host.identify import Sources, read_power

_SUPPLIES = "/sys/class/power_supply"


def saves_power(sources: Sources | None = None) -> str:
    """Return why this machine saves power, in words; "" if it does not, or it is unknown."""
    sources = sources or Sources()
    if _on_battery(sources):
        return "on its battery"
    power = read_power(sources)
    slowest = power.slowest
    if power.mode is not None and power.mode == slowest:
        return f"in its slowest power mode, {slowest.name}"
    return ""


def _on_battery(sources: Sources) -> bool:
    """Return whether a battery of the machine's own feeds it.

    One of a mouse has the scope Device. USB sockets that nothing feeds are on boards without a
    battery too, so that only a Mains that is off tells of one whose battery is silent.
    """
    battery = discharging = unplugged = False
    folder = sources.root / _SUPPLIES.lstrip("/")
    for name in sorted(supply.name for supply in folder.glob("*")):
        kind, scope, status, online = (
            sources.read(f"{_SUPPLIES}/{name}/{fact}")
            for fact in ("type", "scope", "status", "online")
        )
        if kind == "Battery":
            battery |= scope != "Device"
            discharging |= scope != "Device" and status == "Discharging"
        elif online not in ("", "0"):  # 2 is a supply of several voltages
            return False
        else:
            unplugged |= kind == "Mains" and online == "0"
    return discharging or (battery and unplugged)
