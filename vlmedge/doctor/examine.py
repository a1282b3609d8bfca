"""What is wrong with this machine, and what to do about it.

Each check looks at one thing of a `Patient` and returns findings; a patient is a root folder, a
runner of tools and a list of folders with Python packages, so a fault is seeded with files.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmedge.doctor.patient import Check, Finding, Patient


def checks() -> Mapping[str, Check]:
    """Return every check by its name, in the order of the report."""
    from vlmedge.doctor import engine_checks as doctor_engines
    from vlmedge.doctor import machine_checks as doctor_machine

    return {**doctor_machine.CHECKS, **doctor_engines.CHECKS}


def examine(patient: Patient) -> tuple[Finding, ...]:
    """Run every check."""
    return tuple(finding for check in checks().values() for finding in check(patient))
