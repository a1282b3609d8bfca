"""How equal is equal: one table of tolerances, and the values that are compared with it.

No case may lower its gate: a component that needs more room is a finding, not an exception.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from vlmedge.arrays import Array
from vlmedge.errors import UnknownNameError
from vlmedge.run.decode.sampling import log_softmax
from vlmedge.spec.manifest import ComponentParity, TaskParity


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest deviation that a scheme may cause.

    Attributes:
        max_rel: Largest difference over the reference's largest value, or none.
        cosine: Least cosine of one sample's output with the reference's.
        agreement: Least share of equal answers where nobody knows the right ones.
        drop: Most accuracy that may be lost where the data has labels, in shares of 1,
            beyond one standard error of the paired difference (McNemar 1947): where a model
            guesses, rounding flips its guesses both ways.
    """

    max_rel: float | None
    cosine: float
    agreement: float
    drop: float


TOLERANCES = {
    # Two float32 programs that add in another order differ by 1e-7 to 2e-6 on every graph that
    # was tried (up to 39 layers); 1e-4 is where a real mistake begins.
    "float32": Tolerance(max_rel=1e-4, cosine=0.99999, agreement=1.0, drop=0.0),
    # 8-bit rounding leaves 0.5 to 1 % noise a layer, which adds up to a cosine of 0.995 or better;
    # half a point of accuracy is what the project promises. Without labels, answers to pictures
    # that say nothing to the model are near ties: one in ten may flip.
    "int8": Tolerance(max_rel=None, cosine=0.99, agreement=0.9, drop=0.005),
    # E4M3 keeps 3 bits of mantissa: 2 to 3 % noise a layer.
    "fp8": Tolerance(max_rel=None, cosine=0.98, agreement=0.85, drop=0.005),
    # 11 bits of mantissa: what is lost is lost by overflow, which shows at once.
    "fp16": Tolerance(max_rel=None, cosine=0.999, agreement=0.95, drop=0.001),
    # 4 bits leave 8 to 10 % noise a layer; a point of accuracy is what the project promises.
    "int4": Tolerance(max_rel=None, cosine=0.95, agreement=0.7, drop=0.01),
}


_WORST = sys.float_info.max  # JSON has no nan and no inf


def tolerance(scheme: str) -> Tolerance:
    """Return what `scheme` may change."""
    if scheme not in TOLERANCES:
        raise UnknownNameError(
            f"no tolerance for scheme {scheme!r}: add one to vlmedge/parity/tolerances.py"
        )
    return TOLERANCES[scheme]


def compare(component: str, scheme: str, reference: Array, ours: Array) -> ComponentParity:
    """Compare one component's output with PyTorch's.

    Args:
        component: Its name.
        scheme: The scheme that the component was quantized with.
        reference: PyTorch's, [samples, ...].
        ours: The engine's, the same shape.
    """
    allowed = tolerance(scheme)
    reference, ours = reference.astype(np.float64), ours.astype(np.float64)
    if not np.isfinite(ours).all():
        return ComponentParity(component, _WORST, _WORST, -1.0, "no nan or inf", passed=False)
    max_abs = float(np.abs(reference - ours).max())
    max_rel = max_abs / max(float(np.abs(reference).max()), 1e-30)
    a, b = reference.reshape(len(reference), -1), ours.reshape(len(ours), -1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-30)).min())
    fits = cosine >= allowed.cosine
    text = f"cosine >= {allowed.cosine:g}"
    if allowed.max_rel is not None:
        fits = fits and max_rel <= allowed.max_rel
        text = f"relative <= {allowed.max_rel:g}"
    return ComponentParity(component, max_abs, max_rel, cosine, text, bool(fits))


def divergence(reference: Array, ours: Array) -> float:
    """Return the mean divergence of two sets of logits, nats.

    Args:
        reference: PyTorch's, [samples, vocabulary].
        ours: The engine's, the same shape.
    """
    p, q = (log_softmax(logits.astype(np.float64)) for logits in (reference, ours))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def worst(results: list[ComponentParity]) -> ComponentParity:
    """Return the worst values of several comparisons of one component."""
    first = results[0]
    return ComponentParity(
        component=first.component,
        max_abs=max(r.max_abs for r in results),
        max_rel=max(r.max_rel for r in results),
        cosine=min(r.cosine for r in results),
        tolerance=first.tolerance,
        passed=all(r.passed for r in results),
        kl=first.kl,
    )


def judge(
    task: str,
    scheme: str,
    reference: list[object],
    ours: list[object],
    right: list[object] | None,
) -> TaskParity:
    """Compare a task's answers with PyTorch's, and both with the right ones if known.

    float32 must agree to the last answer. A quantized model must keep its accuracy where there
    are labels, and agree often enough where there are none.
    """
    allowed, count = tolerance(scheme), len(reference)
    agreement = sum(a == b for a, b in zip(reference, ours, strict=True)) / count
    if right is None:
        text = f"agreement >= {allowed.agreement:.0%}"
        return TaskParity(task, count, agreement, None, None, text, agreement >= allowed.agreement)
    accuracy = sum(a == b for a, b in zip(right, ours, strict=True)) / count
    reference_accuracy = sum(a == b for a, b in zip(right, reference, strict=True)) / count
    if scheme == "float32":
        text, passed = "agreement = 100%", agreement == 1.0
    else:
        # answers that one side alone got right: their count is noisy, by its square root
        pairs = list(zip(right, reference, ours, strict=True))
        flipped = sum((r == a) != (r == b) for r, a, b in pairs)
        most = allowed.drop + math.sqrt(flipped) / count
        text = f"drop <= {100 * most:.1f} points"
        passed = reference_accuracy - accuracy <= most + 1e-9
    return TaskParity(task, count, agreement, accuracy, reference_accuracy, text, passed)
