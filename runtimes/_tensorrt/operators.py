"""Which ONNX operators TensorRT's parser reads, by version, as data.

Read in onnx/onnx-tensorrt docs/operators.md: "TensorRT 8.5" at commit 6d0ab7be, "TensorRT 10.6" at
0137504e, and the table that calls itself "TensorRT 10.15"; what came between them is from
docs/Changelog.md of the 10.15 release. Versions whose own table was not read (8.6, 10.3, 10.13,
10.16, 11.x) are the nearest table that was read, plus or minus those lines of the change log; where
a line leaves a doubt, the operator counts as missing. 11.0 adds Swish by NVIDIA/TensorRT's
CHANGELOG.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vlmedge.errors import InputError

Version = tuple[int, int]

OLDEST: Version = (8, 6)
KNOWN = ("8.6", "10.3", "10.13", "10.16", "11.0")  # what boards and desktops have; see `version_of`

_FLOAT = frozenset({"float32", "float16", "bfloat16"})
_NUMBER = _FLOAT | {"int32", "int64"}
_ANY = _NUMBER | {"bool"}
_BOOL = frozenset({"bool"})

# Types of the 10.6 table; the version tables below say since when an operator is there.
_TYPED: Mapping[frozenset[str], str] = {
    _FLOAT: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization BlackmanWindow Ceil Celu
        Clip Conv ConvTranspose Cos Cosh CumSum DeformConv Dropout Einsum Elu Erf Exp Floor Gemm
        GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample GroupNormalization GRU
        HammingWindow HannWindow HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization
        IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul
        MaxPool MeanVarianceNormalization Mish NonMaxSuppression NonZero PRelu ParametricSoftplus
        Pow RNN RMSNormalization RandomNormal RandomNormalLike RandomUniform RandomUniformLike
        Reciprocal Resize RoiAlign RotaryEmbedding Round STFT ScaledTanh Scan Selu Sigmoid Sin Sinh
        Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Upsample""",
    _NUMBER: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less
        LessOrEqual Max Mean Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
        Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TensorScatter TopK""",
    _ANY: """
        Attention Cast CastLike Concat Constant ConstantOfShape DequantizeLinear Expand EyeLike
        Flatten Gather GatherElements GatherND Identity If Loop OneHot QuantizeLinear Reshape
        ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    _BOOL: "And Not Or Xor",
}

# (first version that reads it, what it reads beyond the version before)
_ADDED: tuple[tuple[Version, str], ...] = (
    ((9, 0), "CastLike"),  # in the 9.2 table, not in the 8.5 one
    ((9, 2), "Hardmax"),
    ((10, 1), "DeformConv"),
    ((10, 4), "BlackmanWindow HammingWindow HannWindow"),
    ((10, 5), "STFT"),
    ((10, 6), "Gelu Mish"),  # in the 10.6 table, not in the 9.2 one, in no line between
    ((10, 14), "Attention"),
    ((10, 15), "RMSNormalization RotaryEmbedding TensorScatter"),
    ((11, 0), "Swish"),
)
# What the 8.5 table and the 8.6 change log allow less than the 10.6 table. INT64 counts as INT32,
# to which 8.6 casts it.
_NARROW_8: Mapping[frozenset[str], str] = {
    _FLOAT: """
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare Relu""",
    _FLOAT | {"bool"}: "ConstantOfShape",
}


def names(text: str) -> frozenset[str]:
    """Split a list of operators."""
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Operators:
    """Operators and types that the parser of one version reads.

    Attributes:
        version: (major, minor).
        opset: The newest opset.
        types: By operator: numpy's names of the types that its first output may have. Comparisons
            and Shape give another type than they take; for them it is the type of the input.
    """

    version: Version
    opset: int
    types: Mapping[str, frozenset[str]]


def version_of(text: str) -> Version:
    """Read "10.3", "10.13.3.9", "11" or "11.x"; refuse what no table is there for."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+|x)(?:\.\w+)*)?", text.strip())
    if match is None:
        raise InputError(f"TensorRT {text!r} is not a version: give one like {', '.join(KNOWN)}")
    major, minor = int(match[1]), match[2]
    version = (major, int(minor) if minor and minor != "x" else 0)
    if major == 8 and minor in (None, "x"):
        version = OLDEST
    if version < OLDEST:
        raise InputError(
            f"TensorRT {text} is too old: 8.6 (JetPack 6.0) is the oldest that builds, "
            "on JetPack 4 and 5 use --engine ort"
        )
    return version


def operators(version: Version) -> Operators:
    """Return the table of a version."""
    first = {name: since for since, added in _ADDED for name in names(added)}
    types = {
        name: allowed
        for allowed, listed in _TYPED.items()
        for name in names(listed)
        if version >= first.get(name, OLDEST)
    }
    if version < (9, 0):
        narrow = {name: t for t, listed in _NARROW_8.items() for name in names(listed)}
        types |= {name: t for name, t in narrow.items() if name in types}
        for name in ("TopK", "ArgMax", "ArgMin"):
            types[name] = _FLOAT | {"int32", "int64"}  # INT32 by the 8.6 change log
        types["ReduceSum"] = _FLOAT | {"int32", "int64"}  # it sums INT32 too: seen on 8.6.0
    if version >= (10, 12):
        types["Pow"] = _NUMBER
    return Operators(version, _opset(version), types)


def _opset(version: Version) -> int:
    """Return the newest opset: 17 in 8.5 and 8.6, 20 in 10.0, 22 in 10.6, 24 in 10.15 and 11.2."""
    for since, opset in (((10, 15), 24), ((10, 6), 22), ((10, 0), 20)):
        if version >= since:
            return opset
    return 17
