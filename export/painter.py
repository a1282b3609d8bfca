"""SegGPT (Wang et al. 2023, arXiv 2304.03284) and Painter (arXiv 2212.02499): paint as shown.

    prompt_pixel_values     prompt_masks     two streams of one ViT, whose mean is taken after
    -------------------     ------------     layer merge_index; the lower half of what they are
    pixel_values            mask token       decoded to is the painting

Both are transformers' SegGptForImageSegmentation: Painter is SegGPT without tokens for the type of
a mask. Its repository names windows of attention, but by a misplaced bracket no layer has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.seggpt.modeling_seggpt import SegGptAttention

from vlmedge.arrays import Array
from vlmedge.errors import CheckpointError
from vlmedge.spec import Component, ImageFrontEnd, ModelSpec, PaintTask, TensorSpec

from ._checkpoint import presets
from ._checkpoint.folder import read_config, read_image_front_end, read_json
from ._checkpoint.weights import Weights, WeightsView, open_saved, open_weights
from ._tiny import save
from ._trace.hub_export import HubExport
from ._trace.rename import respell

SEGGPT, PAINTER, ORIGINAL = "SegGptForImageSegmentation", "Painter", "SegGPT"
ARCHITECTURES = ("SegGptForImageSegmentation", "Painter", "SegGPT")
ALIASES = {"seggpt": "BAAI/seggpt-vit-large"}
TINY = ("seggpt", "painter")

POSITIONS = "model.embeddings.position_embeddings"
TYPES = ("type_token_semantic", "type_token_instance")

RULES = (  # from the names of github.com/baaivision/Painter, both of whose models have one layout
    (r"^patch_embed\.proj\.", "model.embeddings.patch_embeddings.projection."),
    (r"^mask_token", "model.embeddings.mask_token"),
    (r"^segment_token_x", "model.embeddings.segment_token_input"),
    (r"^segment_token_y", "model.embeddings.segment_token_prompt"),
    (r"^type_token_cls", "model.embeddings.type_token_semantic"),
    (r"^type_token_ins", "model.embeddings.type_token_instance"),
    (r"^pos_embed", POSITIONS),
    (r"^blocks\.", "model.encoder.layers."),
    (r"^norm\.", "model.encoder.layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.fc(\d)\.", r".mlp.lin\1."),
    (r"^decoder_embed\.", "decoder.decoder_embed."),
    (r"^decoder_pred\.0\.", "decoder.decoder_pred.conv."),
    (r"^decoder_pred\.1\.", "decoder.decoder_pred.layernorm."),
    (r"^decoder_pred\.3\.", "decoder.decoder_pred.head."),
)

COCO_POINTS = (
    "nose",
    *(f"{side} {part}" for part in ("eye", "ear") for side in ("left", "right")),
    *(
        f"{side} {part}"
        for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ),
)


class Attention(SegGptAttention):
    """Attention whose tables of relative positions have the graph's own size: no interpolation."""

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: torch.Tensor) -> torch.Tensor:
        """Map float [2 x size - 1, width of a head] to [size, size, width of a head]."""
        places = torch.arange(q_size, device=rel_pos.device)
        return rel_pos[places[:, None] - places[None, :] + (k_size - 1)]


class Dense(torch.nn.Module):
    """The whole network at inference: what is masked is the lower half of the paintings."""

    def __init__(self, config: Any, *, typed: bool) -> None:
        super().__init__()
        whole = transformers.SegGptForImageSegmentation(config)
        self.model, self.decoder = whole.model, whole.decoder
        self.patch, self.merge = config.patch_size, config.merge_index
        self.kept = config.intermediate_hidden_state_indices
        embeddings = self.model.embeddings
        grid = [side // self.patch for side in config.image_size]
        embeddings.position_embeddings = torch.nn.Parameter(
            torch.empty(1, *grid, config.hidden_size)
        )
        if not typed:
            for name in TYPES:
                delattr(embeddings, name)
        layers: Any = self.model.encoder.layers
        for layer in layers:
            layer.attention.__class__ = Attention

    def forward(
        self,
        pixel_values: torch.Tensor,
        prompt_pixel_values: torch.Tensor,
        prompt_masks: torch.Tensor,
        group: torch.Tensor,
        instance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map float [batch, 3, height, width] thrice to pred_masks of that shape.

        `group` and `instance` are int64 [batch]; see PaintTask.
        """
        encoder: Any = self.model.encoder
        states = self._embed(pixel_values, prompt_pixel_values, prompt_masks, instance)
        same = (group[:, None] == group[None, :]).float()  # [batch, batch]
        shares, alone = same / same.sum(1, keepdim=True), same.sum(1) == 1
        found = []
        _, height, width, channels = states.shape
        for i, layer in enumerate(encoder.layers):
            seen = layer.attention(layer.layernorm_before(states))[0]
            above, below = seen.split(height // 2, dim=1)
            below = self._ensembled(below, shares, alone, i)
            states = states + torch.cat([above, below], dim=1)
            states = states + layer.mlp(layer.layernorm_after(states))
            if i == self.merge:
                pair = states.reshape(2, -1, height, width, channels)
                states = (pair[0] + pair[1]) * 0.5
            if i in self.kept:
                # one row of patches more than is painted: the decoder's convolution sees its edge
                found.append(encoder.layernorm(states[:, height // 2 - 1 :]))
        painted: torch.Tensor = self.decoder(torch.cat(found, dim=-1))
        return painted[:, :, self.patch :]

    def _embed(
        self,
        pixels: torch.Tensor,
        prompts: torch.Tensor,
        masks: torch.Tensor,
        instance: torch.Tensor | None,
    ) -> torch.Tensor:
        """Make both streams, [2 x batch, 2 x rows, columns, width]."""
        embeddings: Any = self.model.embeddings

        def project(pixels: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = embeddings.patch_embeddings.projection(pixels)
            return found.permute(0, 2, 3, 1)

        asked = project(pixels)
        seen = torch.cat([project(prompts), asked], dim=1) + embeddings.segment_token_input
        hidden = embeddings.mask_token.expand_as(asked)
        painted = torch.cat([project(masks), hidden], dim=1) + embeddings.segment_token_prompt
        place = embeddings.position_embeddings
        if instance is not None:
            semantic, single = (getattr(embeddings, name) for name in TYPES)
            place = place + torch.where(instance[:, None, None, None] > 0, single, semantic)
        return torch.cat([seen + place, painted + place], dim=0)

    def _ensembled(
        self, below: torch.Tensor, shares: torch.Tensor, alone: torch.Tensor, i: int
    ) -> torch.Tensor:
        """Average what the examples of one picture find for it.

        At the layer after which the streams merge, transformers (5.23) averages both of them into
        one already, which SegGPT's own code does not; here as there.
        """
        streams = below.reshape(2 if i <= self.merge else 1, shares.shape[0], -1)
        mixed = shares @ streams
        if i == self.merge:
            mixed = torch.where(alone[None, :, None], mixed, mixed.mean(0, keepdim=True))
        return mixed.reshape(below.shape)


class Placed(WeightsView):
    """Weights whose position embeddings have the graph's grid: resized once, at export."""

    def __init__(self, weights: Weights, grid: tuple[int, int]) -> None:
        """Resize where they are a square and a class token.

        Args:
            weights: Under transformers' names.
            grid: Rows and columns of patches.
        """
        super().__init__(weights)
        self._grid = grid
        self._stored = weights.shapes().get(POSITIONS, ())
        count = self._stored[1] - 1 if len(self._stored) == 3 else 0
        self._side = math.isqrt(count) if count > 0 and math.isqrt(count) ** 2 == count else 0
        self.made = (POSITIONS,) if self._side else ()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes = dict(self._weights.shapes())
        if self._side:
            shapes[POSITIONS] = (1, *self._grid, self._stored[2])
        return shapes

    def make(self, name: str) -> Array:
        """Resize the positions' square to the grid; the class token's goes."""
        found = self._weights.read(name)
        square = torch.from_numpy(found[:, 1:]).reshape(1, self._side, self._side, -1)
        planes = square.permute(0, 3, 1, 2)
        if self._grid != (self._side, self._side):
            planes = torch.nn.functional.interpolate(
                planes, size=self._grid, mode="bicubic", align_corners=False
            )
        placed: Array = np.ascontiguousarray(planes.permute(0, 2, 3, 1).numpy())
        return placed


def describe(config: Any, front: ImageFrontEnd, *, typed: bool, painter: bool) -> ModelSpec:
    """Name the graph and the tasks of one checkpoint."""
    size = (config.image_size[0] // 2, config.image_size[1])
    pictures = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    inputs = [TensorSpec(name, "float32", ("batch", 3, *size)) for name in pictures]
    inputs += [
        TensorSpec(name, "int64", ("batch",))
        for name in ("group", *(("instance",) if typed else ()))
    ]
    dense = Component(
        "dense",
        inputs=tuple(inputs),
        outputs=(TensorSpec("pred_masks", "float32", ("batch", 3, *size)),),
    )
    tasks = painter_tasks() if painter else seggpt_tasks()
    return ModelSpec("painter", (dense,), {**tasks}, front_ends={"pixel_values": front})


def seggpt_tasks() -> dict[str, PaintTask]:
    """Return what SegGPT paints: masks, of one thing or of a kind of thing."""
    one, kind = (
        PaintTask(("dense",), "pred_masks", "labels", "nearest", "nearest", instance=number)
        for number in (1, 0)
    )
    return {"paint": one, "semantic": kind}


def painter_tasks() -> dict[str, PaintTask]:
    """Return what Painter paints, resized as each task's evaluation in its repository does."""
    picture = PaintTask(("dense",), "pred_masks", "picture", "bicubic", "bicubic")
    return {
        "paint": picture,
        "segment": PaintTask(("dense",), "pred_masks", "labels", "bilinear", "bicubic"),
        "depth": PaintTask(("dense",), "pred_masks", "depth", "bilinear", "bicubic", depth_m=10.0),
        "keypoints": PaintTask(
            ("dense",), "pred_masks", "points", "nearest", "bicubic", points=COCO_POINTS
        ),
        "denoise": picture,
        "derain": picture,
        "enhance": picture,
    }


class Painter:
    """SegGPT in transformers' layout; Painter and SegGPT in their authors'.

    The authors' folders have a config.json of one's own: {"architectures": ["Painter"]}, and fields
    of SegGptConfig that differ from ViT-L's.
    """

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        raw = read_json(folder, "config.json") or {}
        kind = next(name for name in ARCHITECTURES if name in raw.get("architectures", ()))
        if kind == SEGGPT:
            config = read_config(folder, needed=("hidden_size", "image_size"))
        else:
            config = _config(folder, raw)
        height, width = config.image_size
        size = (height // 2, width)
        default = presets.imagenet(size)
        front = read_image_front_end(folder, default)
        if front.resize_size != size or front.crop_size or front.rescale_factor != 1 / 255:
            raise CheckpointError(
                f"{folder}: its pictures are made {front.resize_size[1]} x {front.resize_size[0]}, "
                f"config.json has place for {size[1]} x {size[0]} in 255ths: download both again"
            )
        typed = kind != PAINTER
        builds = {"dense": lambda: Dense(config, typed=typed)}
        opened = _open_weights(folder, allow_pickle=allow_pickle, saved=kind != SEGGPT)
        named = respell(opened, () if kind == SEGGPT else RULES, builds)
        weights = Placed(named, (height // config.patch_size, width // config.patch_size))
        spec = describe(config, front, typed=typed, painter=kind == PAINTER)
        return HubExport(folder, spec, builds, weights)

    def tiny(self, name: str, folder: Path) -> transformers.SegGptForImageSegmentation:
        """Write a random SegGPT of 4 layers, or a Painter in its authors' layout.

        The streams merge after the second layer, so there are layers of every kind.
        """
        config = transformers.SegGptConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=[64, 32],
            patch_size=8,
            mlp_dim=64,
            decoder_hidden_size=8,
            intermediate_hidden_state_indices=[1, 2, 3],
            merge_index=1,
            pretrain_image_size=16,
        )
        model = transformers.SegGptForImageSegmentation(config)
        images = transformers.SegGptImageProcessor(size={"height": 32, "width": 32})
        save(model, folder, image_processor=images, gain=0.5)
        if name == "painter":
            _write_as_painter(model, folder)
        return model


def _config(folder: Path, raw: Mapping[str, Any]) -> Any:
    """Read the authors' kind of config.json: what differs from ViT-L."""
    fields = {name: value for name, value in raw.items() if name != "architectures"}
    try:
        config = transformers.SegGptConfig(**fields)
    except Exception as error:  # transformers raises what each config class happens to raise
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder / 'config.json'} is refused: {line}") from None
    return config


def _open_weights(folder: Path, *, allow_pickle: bool, saved: bool) -> Weights:
    """Find the weights; the authors' own file is a .pth, with the weights inside."""
    if saved:
        return open_saved(folder, "*.pth", "model", allow_pickle=allow_pickle)
    return open_weights(folder, allow_pickle=allow_pickle)


# transformers' names and the authors', for the tiny Painter
AUTHORS = {
    "model.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "model.embeddings.mask_token": "mask_token",
    "model.embeddings.segment_token_input": "segment_token_x",
    "model.embeddings.segment_token_prompt": "segment_token_y",
    "model.embeddings.position_embeddings": "pos_embed",
    "model.encoder.layers": "blocks",
    "model.encoder.layernorm": "norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention": "attn",
    "lin1": "fc1",
    "lin2": "fc2",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_pred.conv": "decoder_pred.0",
    "decoder.decoder_pred.layernorm": "decoder_pred.1",
    "decoder.decoder_pred.head": "decoder_pred.3",
}


def _write_as_painter(model: transformers.SegGptForImageSegmentation, folder: Path) -> None:
    """Write a checkpoint again under Painter's names, after making its type tokens 0."""
    embeddings: Any = model.model.embeddings
    for name in TYPES:
        getattr(embeddings, name).data.zero_()
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(TYPES):
            for theirs, authors in AUTHORS.items():
                name = name.replace(theirs, authors)
            found[name] = tensor.contiguous()
    save_file(found, folder / "model.safetensors")
    fields = read_json(folder, "config.json") or {}
    kept = {name: value for name, value in fields.items() if name not in ("model_type", "dtype")}
    (folder / "config.json").write_text(json.dumps({**kept, "architectures": [PAINTER]}))


FAMILY = Painter()
