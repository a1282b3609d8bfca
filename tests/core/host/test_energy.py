"""Energy from counters and rails, on machines that are folders of files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from kit.machines import I2C, ORIN_NANO_RAILS, seed

from vlmedge.host import energy
from vlmedge.host.energy import NOT_TOLD, find_meter

RAPL = "/sys/class/powercap"
AGX_ORIN = {
    f"{I2C}/1-0040/name": "ina3221\n",
    f"{I2C}/1-0040/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    f"{I2C}/1-0040/hwmon/hwmon3/in1_input": "20000\n",
    f"{I2C}/1-0040/hwmon/hwmon3/curr1_input": "200\n",
    f"{I2C}/1-0041/name": "ina3221\n",
    f"{I2C}/1-0041/hwmon/hwmon4/in1_label": "NC\n",
    f"{I2C}/1-0041/hwmon/hwmon4/in1_input": "20000\n",
    f"{I2C}/1-0041/hwmon/hwmon4/curr1_input": "9999\n",
    f"{I2C}/1-0041/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO\n",
    f"{I2C}/1-0041/hwmon/hwmon4/in2_input": "5000\n",
    f"{I2C}/1-0041/hwmon/hwmon4/curr2_input": "100\n",
    f"{I2C}/2-0041/name": "eeprom\n",
}
NANO = {
    f"{I2C}/6-0040/name": "ina3221x\n",
    f"{I2C}/6-0040/iio:device0/rail_name_0": "POM_5V_IN\n",
    f"{I2C}/6-0040/iio:device0/in_power0_input": "3000\n",
    f"{I2C}/6-0040/iio:device0/rail_name_1": "POM_5V_GPU\n",
    f"{I2C}/6-0040/iio:device0/in_power1_input": "900\n",
}


def counters(start_uj: int = 1_000_000) -> dict[str, str]:
    """Return two packages, the parts of one, and what tells the same again."""
    files = {}
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        files |= {
            f"{RAPL}/{zone}/name": f"{name}\n",
            f"{RAPL}/{zone}/energy_uj": f"{start_uj}\n",
            f"{RAPL}/{zone}/max_energy_range_uj": "262143328850\n",
        }
    return files


def test_packages_and_memory_are_added_up(tmp_path: Path) -> None:
    seed(tmp_path, counters())
    meter, source = find_meter(tmp_path)
    assert meter is not None
    assert source == meter.source == "RAPL package-0, package-0 dram, package-1"
    with meter.measure() as reading:
        time.sleep(0.01)
        seed(tmp_path, counters(3_500_000))
    assert reading.joules == pytest.approx(7.5)
    assert reading.watts == pytest.approx(7.5 / reading.seconds) and reading.seconds > 0.01


def test_counter_that_starts_again_is_no_negative_energy(tmp_path: Path) -> None:
    seed(tmp_path, counters(262143328850 - 499_999))
    meter, _ = find_meter(tmp_path)
    assert meter is not None
    with meter.measure() as reading:
        seed(tmp_path, counters(500_000))
    assert reading.joules == pytest.approx(3 * 1.0)


@pytest.mark.parametrize(
    ("files", "source", "watts"),
    [
        (ORIN_NANO_RAILS, "INA3221 VDD_IN", 6.0),
        (AGX_ORIN, "INA3221 VDD_GPU_SOC, VDDQ_VDD2_1V8AO", 4.5),
        (NANO, "INA3221 POM_5V_IN", 3.0),
    ],
)
def test_rails_are_added_up_over_time(
    files: dict[str, str], source: str, watts: float, tmp_path: Path
) -> None:
    seed(tmp_path, files)
    meter, told = find_meter(tmp_path)
    assert meter is not None and told == source
    with meter.measure() as reading:
        time.sleep(3 * energy.SAMPLE_S)
    assert reading.seconds > 2 * energy.SAMPLE_S
    assert reading.watts == pytest.approx(watts)


def test_power_that_changes_is_followed(tmp_path: Path) -> None:
    seed(tmp_path, ORIN_NANO_RAILS)
    meter, _ = find_meter(tmp_path)
    assert meter is not None
    with meter.measure() as reading:
        time.sleep(5 * energy.SAMPLE_S)
        file = tmp_path / I2C[1:] / "1-0040/hwmon/hwmon1/curr1_input"
        fresh = file.with_name("fresh")
        fresh.write_text("3600\n")
        os.replace(fresh, file)
        time.sleep(5 * energy.SAMPLE_S)
    assert 6.5 < reading.watts < 17.5


def test_machine_that_tells_nothing_says_so(tmp_path: Path) -> None:
    assert find_meter(tmp_path) == (None, NOT_TOLD)
    seed(tmp_path, {f"{I2C}/1-0040/name": "ina3221", f"{RAPL}/intel-rapl:0/name": "package-0"})
    assert find_meter(tmp_path) == (None, "not told by this machine")


def test_counters_for_root_alone_are_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed(tmp_path, counters())

    def refuse(zone: energy.Zone) -> int:
        raise PermissionError(13, "Permission denied", str(zone.file))

    monkeypatch.setattr(energy.Zone, "read_uj", refuse)  # tests may run as root
    meter, why = find_meter(tmp_path)
    assert meter is None and "root alone: sudo chmod a+r" in why
