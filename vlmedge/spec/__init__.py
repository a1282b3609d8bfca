"""A model as data, free of any framework or engine: the structs of the manifest."""

from vlmedge.spec.front_ends import (
    INPUT_IDS,
    INSTRUCTION_IDS,
    PIXELS,
    AnyRes,
    FrontEnd,
    ImageFrontEnd,
    TextFrontEnd,
    Tiling,
    VideoFrontEnd,
)
from vlmedge.spec.model import (
    ModelSpec,
)
from vlmedge.spec.tasks import (
    MASK_CODE_KINDS,
    MASK_CODES,
    ChatTask,
    EmbedTask,
    GenerateTask,
    Generation,
    ImageText,
    InfillTask,
    LabelTask,
    MaskCodes,
    MatchTask,
    PaintTask,
    ScoreTask,
    Task,
)
from vlmedge.spec.tensors import (
    AdapterSlot,
    Component,
    EmbeddingTable,
    TensorSpec,
)

__all__ = [
    "INPUT_IDS",
    "INSTRUCTION_IDS",
    "MASK_CODES",
    "MASK_CODE_KINDS",
    "PIXELS",
    "AdapterSlot",
    "AnyRes",
    "ChatTask",
    "Component",
    "EmbedTask",
    "EmbeddingTable",
    "FrontEnd",
    "GenerateTask",
    "Generation",
    "ImageFrontEnd",
    "ImageText",
    "InfillTask",
    "LabelTask",
    "MaskCodes",
    "MatchTask",
    "ModelSpec",
    "PaintTask",
    "ScoreTask",
    "Task",
    "TensorSpec",
    "TextFrontEnd",
    "Tiling",
    "VideoFrontEnd",
]
