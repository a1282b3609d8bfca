"""Pictures beside the text and not among it: gated cross-attention, as Flamingo's kind has it.

pixel_values -> vision_encoder -> resampler -> cross_kv -> media, all pictures one after the other
                                                             |  the same at every step
                     token, media_index, past_key_values -> decoder
"""

from __future__ import annotations

import torch

from vlmedge.spec import Component, GenerateTask, ImageText, TensorSpec

from .._trace.hub_export import state_pairs

ENCODE = ("vision_encoder", "resampler", "cross_kv")
MEDIA = "media"


def visible(
    media_index: torch.Tensor, rows: int, latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each token sees of the pictures.

    Args:
        media_index: Index of each token's picture, int64 [batch, tokens]; -1 is none.
        rows: Rows of all pictures together.
        latents: Rows of one picture.

    Returns:
        What is added to the scores, float32 [batch, 1, tokens, rows]: 0 for the token's picture,
        else the lowest float; and bool [batch, tokens, 1]: whether there is any, since softmax
        shares out evenly where all is shut.
    """
    places = torch.arange(rows, device=media_index.device)
    picture = torch.div(places, latents, rounding_mode="floor")
    seen = media_index[:, :, None] == picture[None, None, :]
    shut = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    return shut, (media_index >= 0)[:, :, None]


def components(
    image_size: int,
    rows: int,
    seen_width: int,
    latents: int,
    media_width: int,
    decoder: Component,
) -> tuple[Component, ...]:
    """Name the graphs from pixels to text.

    Args:
        image_size: Side of a picture, pixels.
        rows: Rows that the vision encoder gives for one picture.
        seen_width: Width of such a row.
        latents: Rows that the resampler gives for one picture.
        media_width: Width of keys and values of one latent, for all gated layers.
        decoder: From `describe_decoder`.
    """
    seen = TensorSpec("image_embeds", "float32", ("batch", rows, seen_width))
    resampled = TensorSpec("latent_embeds", "float32", ("batch", latents, seen_width))
    soft = TensorSpec("soft_prompt", "float32", ("batch", latents, media_width))
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, image_size, image_size))
    return (
        Component("vision_encoder", inputs=(pixels,), outputs=(seen,)),
        Component("resampler", inputs=(seen,), outputs=(resampled,)),
        Component("cross_kv", inputs=(resampled,), outputs=(soft,)),
        decoder,
    )


def describe_decoder(
    layers: int, heads: int, width: int, media_width: int, vocabulary: int
) -> Component:
    """Name the inputs and outputs of a decoder that looks at pictures."""
    state, each = state_pairs(layers), width // heads
    past = [TensorSpec(i, "float32", ("batch", heads, "past", each)) for _, i in state]
    present = [TensorSpec(o, "float32", ("batch", heads, "total", each)) for o, _ in state]
    return Component(
        "decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", width)),
            TensorSpec("attention_mask", "int64", ("batch", "total")),
            TensorSpec("media_index", "int64", ("batch", "tokens")),
            TensorSpec(MEDIA, "float32", ("batch", "media", media_width)),
            *past,
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", "tokens", vocabulary)), *present),
        state=state,
    )


def task(
    prompt: str, answer: str, image_text: ImageText, image_token_id: int, bos: str = ""
) -> GenerateTask:
    """Wire a text about a picture, which may have examples before it.

    Args:
        prompt: Template, as in `GenerateTask`; an example has the same without `{prompt}`.
        answer: Template behind an example's prompt; `{text}` is the right answer.
        image_text: Text that stands for a picture.
        image_token_id: Its token.
        bos: Text at the beginning, before the examples.
    """
    return GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt=f"{bos}{{examples}}{prompt}",
        image_token_id=image_token_id,
        image_text=image_text,
        example=prompt.replace("{prompt}", "") + answer,
        media=MEDIA,
    )
