"""The kinds of tasks: what goes in, which components run, what comes out."""

from __future__ import annotations

from typing import Literal

from vlmedge.spec.base import Data


class Generation(Data, frozen=True):
    """Defaults of the decode loop, in transformers' terms; every one can be given per call.

    Attributes:
        max_tokens: The most new tokens (transformers' max_new_tokens).
        min_tokens: New tokens before an end token is allowed (min_new_tokens).
        num_beams: 1 is greedy or sampling.
        do_sample: Draw from the distribution instead of taking its top.
        temperature: Divides the logits, > 0.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set with this probability; 1.0 keeps all.
        repetition_penalty: > 1 makes tokens that were seen less likely.
        length_penalty: Exponent of the length that divides a beam's score.
        early_stopping: Stop when num_beams candidates are finished.
        no_repeat_ngram_size: No run of so many tokens comes twice, prompt included; 0 allows it.
        forced_bos_id: The first new token, whatever the model says (forced_bos_token_id), or none.
        forced_eos_id: The last one, at max_tokens (forced_eos_token_id), or none.
        bos_id: First token of a decoder's text, or none.
        eos_ids: Tokens that end a text.
        pad_id: Fills rows that have ended.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None = None
    max_tokens: int = 30
    min_tokens: int = 0
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    no_repeat_ngram_size: int = 0
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None

    @property
    def looks_back(self) -> bool:
        """Whether a token's score depends on the tokens before it, beside what the model says."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0


class ImageText(Data, frozen=True):
    """Text that stands for a picture in a prompt, where `{image}` is.

    A picture that is cut into tiles (`ImageFrontEnd.tiling`) has them row by row, then the whole.

    Attributes:
        placeholder: Text of the token that the soft prompt of one piece takes the place of.
        alone: Text of a picture in one piece; it holds the placeholder once.
        tile: Text of a tile; `{row}` and `{column}` count from 1.
        row_end: Text after the last tile of a row.
        whole: Text of the whole picture after its tiles.
    """

    placeholder: str
    alone: str
    tile: str = ""
    row_end: str = ""
    whole: str = ""


MASK_CODES, MASK_CODE_KINDS = 16, 128  # codes of one mask, and how many kinds there are


class MaskCodes(Data, frozen=True):
    """How the mask codes in an answer, beside a box, become a mask.

    Attributes:
        file: File that a checkpoint must have beside its config.json, so that they can be decoded.
        decode: The component from one tensor, int64 [batch, codes], to another, float32
            [batch, rows, columns], above 0 where the thing is; none: the file was not there.
    """

    file: str
    decode: str | None = None


class GenerateTask(Data, frozen=True, tag="generate", tag_field="kind"):
    """Image in, text out, by the decode loop.

    A soft prompt stands among the embeddings of the text. `instruct` lists components that make it
    depend on the text too (InstructBLIP's Q-Former reads the instruction). `read` lists components
    that run once between the image and the decoder: a text encoder, which takes input_ids or
    inputs_embeds (BLIP's question encoder, T5's encoder), and whatever computes cross-attention
    keys and values. Their outputs are fed to the decoder unchanged at every step.

    Attributes:
        encode: Components from pixel_values to `soft_prompt`, or to what `instruct` begins with.
        soft_prompt: The tensor [batch, n, width] that a picture becomes. A component of `read`
            that takes it by name looks at it; else it stands among the text's embeddings.
        decoder: The component of the decode loop.
        prompt: Template; `{prompt}` or `{question}` is the caller's text, `{image}` the picture,
            `{examples}` the place of examples.
        image_token_id: Id that stands for the soft prompt in the token history, or none.
        image_text: Replacement of `{image}`; none puts the soft prompt before all text.
        example: Template of one example that goes before (few-shot): `{image}`, `{question}` where
            `prompt` has it, `{text}` the right answer; none where the model takes no examples.
        media: The decoder's input that takes the pictures, where it looks at them beside the text
            and not among it; placeholders are tokens then. None puts them among the text.
        answer: Form of the answer: "text", or words among tokens that say where things are:
            "locations" are PaliGemma's, "boxes" and "polygons" Florence-2's, "brackets" Shikra's,
            in plain digits. `vlmedge.run.tasks.boxes` reads them.
        named_by: Where a box gets its name. "answer": from the words around it; "question": from
            the thing that was looked for, whatever words the model puts around it.
        masks: How mask codes in an answer are decoded, or none: answers have no masks.
        regions: How a region that a question points at is written where it has `{region}`, or
            none: the model knows no regions.
        several: Text between the things that are looked for, where they are named in one prompt;
            none asks for one after the other.
        read: Components from the picture and the text to what the decoder is fed throughout.
        start_ids: With `read`: token ids that the decoder begins with, before the text that no
            component of `read` has taken.
        special_tokens: Whether a text of the decoder's gets the tokenizer's own special tokens.
        first_id: Token id that replaces the first one of a text that `read` reads, or none.
        instruct: Components from the last output of `encode`, qformer_input_ids and
            qformer_attention_mask (the text, by the front end of that name) to `soft_prompt`.
        source: Input of `encode`. "video": it gets the frames of a video, and `{image}` is the
            video's place; the rows of all frames, one after the other, are its soft prompt.
    """

    encode: tuple[str, ...]
    soft_prompt: str
    decoder: str
    prompt: str
    image_token_id: int | None = None
    image_text: ImageText | None = None
    example: str | None = None
    media: str | None = None
    answer: Literal["text", "locations", "boxes", "polygons", "brackets"] = "text"
    named_by: Literal["answer", "question"] = "answer"
    masks: MaskCodes | None = None
    regions: Literal["brackets"] | None = None
    several: str | None = None
    read: tuple[str, ...] = ()
    start_ids: tuple[int, ...] = ()
    special_tokens: bool = True
    first_id: int | None = None
    instruct: tuple[str, ...] = ()
    source: Literal["image", "video"] = "image"


class ChatTask(Data, frozen=True, tag="chat", tag_field="kind"):
    """Turns of a conversation about pictures; each text is put together from these.

    Attributes:
        write: The generating task whose components write the replies.
        start: Text before the first turn.
        user: Template of a turn without pictures, up to the reply; `{text}` is the user's text.
        user_images: Template of a turn with pictures; `{images}` is their place.
        image: Template of one picture; `{image}` becomes the generating task's text for it.
        reply_end: Text between a reply and the next turn.
        system: Template in place of `start`, `{text}` being the system text; none: the model takes
            no system text.
    """

    write: str
    start: str
    user: str
    user_images: str
    image: str
    reply_end: str
    system: str | None = None


class MatchTask(Data, frozen=True, tag="match", tag_field="kind"):
    """Image and texts in, a probability for each text out: softmax(scale * cosine + bias).

    Attributes:
        image: Components from pixel_values to `image_output`.
        image_output: The tensor [batch, width] of images; or [batch, vectors, width], and the
            vector that is nearest to a text counts.
        text: Components from input_ids to `text_output`.
        text_output: The tensor [batch, width] of texts.
        logit_scale: Multiplies the cosine.
        template: Text around a label; `{}` is the label.
        logit_bias: Added to the scaled cosine.
        activation: "softmax": the probabilities add up to 1; "sigmoid": each stands alone.
    """

    image: tuple[str, ...]
    image_output: str
    text: tuple[str, ...]
    text_output: str
    logit_scale: float
    template: str
    logit_bias: float = 0.0
    activation: Literal["softmax", "sigmoid"] = "softmax"


class LabelTask(Data, frozen=True, tag="label", tag_field="kind"):
    """Image in, a probability for each label that the model was trained on out.

    Attributes:
        encode: Components from pixel_values to `output`.
        output: The tensor [batch, labels] before the activation.
        labels: Path of a JSON list of names inside the bundle. There may be 21,841 of them, which
            would bury the rest of the manifest.
        activation: "softmax": the probabilities add up to 1; "sigmoid": each stands alone.
    """

    encode: tuple[str, ...]
    output: str
    labels: str
    activation: Literal["softmax", "sigmoid"] = "softmax"


class ScoreTask(Data, frozen=True, tag="score", tag_field="kind"):
    """Image and text in, the probability that they belong together out.

    Attributes:
        image: Components from pixel_values; they run once for several texts.
        text: Components from input_ids, and what `image` gave, to `output`.
        output: The tensor [batch, 2] before the softmax; its second column is the match.
    """

    image: tuple[str, ...]
    text: tuple[str, ...]
    output: str


class InfillTask(Data, frozen=True, tag="infill", tag_field="kind"):
    """Image and a text with gaps in, a ranking of tokens for each gap out.

    Attributes:
        image: Components from pixel_values.
        text: Components from input_ids, and what `image` gave, to `output`.
        output: The tensor [batch, tokens, vocabulary] before the softmax.
        mask_id: The token that stands for a gap.
        mask_text: How it is written, such as "[MASK]".
    """

    image: tuple[str, ...]
    text: tuple[str, ...]
    output: str
    mask_id: int
    mask_text: str


class EmbedTask(Data, frozen=True, tag="embed", tag_field="kind"):
    """One image or text in, one vector of length 1 out; some models give several for an image.

    Attributes:
        modality: Kind of the input: the kind of a front end.
        encode: Components from the front end's tensors to `output`.
        output: The tensor [batch, width], or [batch, vectors, width].
    """

    modality: str
    encode: tuple[str, ...]
    output: str


class PaintTask(Data, frozen=True, tag="paint", tag_field="kind"):
    """Example pictures with their paintings and one picture in, that picture's painting out.

    The graph takes pixel_values and, of one example, prompt_pixel_values and prompt_masks; `group`,
    int64 [batch], is the same for the examples of one picture.

    Attributes:
        paint: Components from these to `output`.
        output: The painting, float32 [batch, 3, height, width], normalised as pictures are.
        means: Meaning of a pixel. "picture": itself. "labels": the nearest colour of a palette, or
            without one the mean of its channels. "depth": the mean of its channels, 255 being
            `depth_m`. "points": red how near a point is, green and blue which of `points`.
        resample: PIL's filter that brings a painting back to the picture's size, as torch has it.
        example_resample: PIL's filter that brings an example's painting to the graph's size.
        instance: Value of the graph's input `instance`, where it has one: 1 for one thing, 0 for a
            kind of thing.
        depth_m: With "depth": the depth at 255, metres.
        points: With "points": the names of the points.
    """

    paint: tuple[str, ...]
    output: str
    means: Literal["picture", "labels", "depth", "points"]
    resample: Literal["nearest", "bilinear", "bicubic"]
    example_resample: Literal["nearest", "bilinear", "bicubic"]
    instance: int = 1
    depth_m: float | None = None
    points: tuple[str, ...] = ()


Task = (
    GenerateTask | ChatTask | MatchTask | LabelTask | ScoreTask | InfillTask | EmbedTask | PaintTask
)
