"""Train tiny-blip2: BLIP-2 (Li et al. 2023, arXiv 2301.12597) on drawn scenes, in four stages.

1. vision: the ViT learns what its patches show (patches.py).
2. language: OPT learns captions and answers from written forms; then it is frozen.
3. representation: ViT and Q-Former learn to see (qformer.py), the paper's first stage.
4. generation: ViT, Q-Former and projection learn to prompt the frozen OPT, the paper's second.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import training
from corpus import IMAGE_MEAN, IMAGE_STD, Form, crowd, form, plans, prompt, render
from patches import PATCH_SIZE_PX, PatchHead, patch_labels
from qformer import PAD, RepresentationStage
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from words import opt_tokenizer
from writing import IGNORED, next_token_loss, pad

from vlmedge.checkpoints.scenes import IMAGE_SIZE_PX, Plan

QUERIES = 16
CONTEXT = 128
BAG = 4  # words of a bag, at most
QUESTIONS_PER_STEP = 3


class Texts:
    """Turns plans into padded token ids; remembers strings, since most come again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.newline = int(tokenizer.convert_tokens_to_ids("Ċ"))
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def caption(self, caption: str) -> tuple[list[int], list[int]]:
        """The empty prompt `</s>` and the caption that follows it."""
        return [2], [*self.ids(caption), self.newline]

    def bags(self, form: Form) -> list[list[int]]:
        """The form that stands where the soft prompt will: int (queries, words), padded."""
        bags = [[i for word in bag for i in self.ids(f" {word}")] for bag in form.bags]
        return [(bag + [PAD] * BAG)[:BAG] for bag in bags]

    def answer(self, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
        """`</s>` with a question, and the answer that follows it."""
        return [2, *self.ids(prompt(pair[0]))], [*self.ids(f" {pair[1]}"), self.newline]

    def document(self, form: Form) -> tuple[list[int], list[int]]:
        """Texts to follow a form, for OPT's own training: ids, and labels of the same length.

        Most documents hold many questions; some hold one text, as BLIP-2 will ask for it.
        """
        asked = self.rng.sample(form.questions, min(7, len(form.questions)))
        targets = [self.answer(pair) for pair in asked]
        if form.caption is not None and self.rng.random() < 0.4:
            targets.insert(self.rng.randrange(len(targets)), self.caption(form.caption))
        if self.rng.random() < 0.3:
            targets = targets[:1]
        ids: list[int] = []
        labels: list[int] = []
        for number, (start, end) in enumerate(targets):
            head = start if number == 0 else start[1:]
            ids += head + end
            labels += [IGNORED] * len(head) + end
        most = CONTEXT - QUERIES
        return ids[:most], labels[:most]

    def targets(self, plan: Plan) -> list[tuple[list[int], list[int]]]:
        """A caption and some questions of one scene."""
        asked = self.rng.sample(plan.questions, QUESTIONS_PER_STEP)
        return [self.caption(plan.caption), *(self.answer(pair) for pair in asked)]


def build(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> Blip2Config:
    """The configuration: every width a multiple of 32."""
    width = options.width
    common = {"num_attention_heads": width // 32, "hidden_size": width}
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    vocab_size = -(-len(tokenizer) // 32) * 32
    return Blip2Config(
        vision_config={
            **common,
            "intermediate_size": 4 * width,
            "num_hidden_layers": options.vision_layers,
            "image_size": IMAGE_SIZE_PX,
            "patch_size": PATCH_SIZE_PX,
            "initializer_range": 0.02,
        },
        qformer_config={
            **common,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 4,
            "vocab_size": vocab_size,
            "max_position_embeddings": CONTEXT,
            "pad_token_id": PAD,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            **common,
            "model_type": "opt",
            "word_embed_proj_dim": width,
            "ffn_dim": 4 * width,
            "num_hidden_layers": 4,
            "vocab_size": vocab_size,
            "max_position_embeddings": CONTEXT,
            "dropout": 0.0,
            "bos_token_id": 2,
            "pad_token_id": PAD,
            "eos_token_id": newline,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


class Run:
    """One training run: the data, the model and the three stages."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.rng = random.Random(options.seed)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.plans = plans("scene", options.pictures)
        self.images = torch.from_numpy(render("scene", options.pictures))
        sample = self.plans[:4000]
        written = [f"{plan.caption}\n" for plan in sample]
        written += [f"{prompt(q)} {a}\n" for plan in sample for q, a in plan.questions]
        forms = [form(plan) for plan in sample] + [crowd(self.rng) for _ in sample]
        written += [f" {word}" for found in forms for bag in found.bags for word in bag]
        if options.resume:  # its ids are what the weights know
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(options.resume)
        else:
            self.tokenizer = opt_tokenizer(written)
        self.tokenizer.model_max_length = CONTEXT - QUERIES
        self.texts = Texts(self.tokenizer, self.rng)
        if options.resume:
            self.model = Blip2ForConditionalGeneration.from_pretrained(
                options.resume, dtype=torch.float32
            )
        else:
            self.model = Blip2ForConditionalGeneration(build(self.tokenizer, options))
            # transformers starts the queries at zero: all alike, they would stay alike.
            nn.init.normal_(self.model.query_tokens, std=0.02)
        self.model.to(self.device)
        self.model.train()
        self.history: dict[str, dict[str, float]] = {}
        self.steps = {
            "vision": options.vision_steps,
            "language": options.language_steps,
            "representation": options.representation_steps,
            "generation": options.steps,
        }

    def trainer(self, name: str, *modules: nn.Module | nn.Parameter) -> training.Trainer:
        """A trainer of these modules, with the steps and the share of the time of its stage."""
        steps = self.steps[name]
        share = steps / sum(self.steps.values())
        return training.Trainer(
            *modules,
            label=name,
            lr=self.options.lr,
            steps=steps,
            minutes=self.options.minutes * share,
        )

    def vision(self) -> None:
        """Teach the ViT what its patches show; the head is dropped afterwards."""
        head = PatchHead(self.options.width).to(self.device)
        labels = patch_labels(self.plans)
        trainer = self.trainer("vision", self.model.vision_model, head)
        for number, picked in self.picks(trainer):
            pixels = training.normalize(self.images[picked].to(self.device))
            with training.autocast(self.options):
                states = self.model.vision_model(pixel_values=pixels).last_hidden_state
                loss = head(states, labels[picked].to(self.device))
            trainer.step(number, {"patches": loss})
        self.history["vision"] = trainer.history

    def language(self) -> None:
        """Teach OPT to write what notes say: no picture here."""
        language_model = AutoModelForCausalLM.from_config(self.model.config.text_config)
        self.model.language_model = language_model.to(self.device).train()
        embed = language_model.get_input_embeddings()
        trainer = self.trainer("language", language_model)
        for number, picked in self.picks(trainer):
            batch = [
                crowd(self.rng) if self.rng.random() < 0.6 else form(self.plans[i])
                for i in picked.tolist()
            ]
            documents = zip(*map(self.texts.document, batch), strict=True)
            rows, labels = ([list(row) for row in rows] for rows in documents)
            ids, targets = pad(rows, PAD).to(self.device), pad(labels, IGNORED).to(self.device)
            forms = torch.tensor([self.texts.bags(found) for found in batch]).to(self.device)
            with training.autocast(self.options):
                # A padded place adds nothing: OPT's embedding of <pad> is zero.
                loss = self.written(embed(forms).sum(2), ids, targets)
            trainer.step(number, {"text": loss})
        self.history["language"] = trainer.history
        language_model.requires_grad_(False)

    def written(self, prefix: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """OPT's loss of writing texts after a prefix.

        Args:
            prefix: float32 (rows, queries, hidden).
            ids: int64 (rows, tokens), padded on the right, where nothing that counts can see it.
            labels: int64 (rows, tokens): `ids` where OPT must write, `IGNORED` elsewhere.
        """
        language_model = self.model.language_model
        inputs = torch.cat([prefix, language_model.get_input_embeddings()(ids)], 1)
        logits = language_model(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=ids.device),
        ).logits[:, prefix.shape[1] :]
        return next_token_loss(logits, labels)

    def representation(self) -> None:
        """Teach ViT and Q-Former; the text branch and the heads are dropped afterwards."""
        config = self.model.config.qformer_config.to_dict() | {"use_qformer_text_input": True}
        stage = RepresentationStage(
            type(self.model.config.qformer_config)(**config),
            self.model.query_tokens,
            self.model.vision_model,
        ).to(self.device)
        trainer = self.trainer("representation", stage)
        for number, pixels, batch in self.pictures(trainer):
            written = [self.texts.caption(plan.caption) for plan in batch]
            captions = pad([start + end for start, end in written], PAD)
            with training.autocast(self.options):
                losses = stage(pixels, captions.to(self.device))
            trainer.step(number, losses)
        self.history["representation"] = trainer.history
        self.model.qformer.load_state_dict(
            {k: v for k, v in stage.qformer.state_dict().items()
             if k in self.model.qformer.state_dict()}
        )  # fmt: skip

    def generation(self) -> None:
        """Teach ViT, Q-Former and projection what the frozen OPT needs as its prompt."""
        model = self.model
        trainer = self.trainer(
            "generation",
            model.vision_model,
            model.qformer,
            model.query_tokens,
            model.language_projection,
        )
        for number, pixels, batch in self.pictures(trainer):
            targets = [target for plan in batch for target in self.texts.targets(plan)]
            ids = pad([start + end for start, end in targets], PAD).to(self.device)
            labels = pad([[IGNORED] * len(start) + end for start, end in targets], IGNORED).to(
                self.device
            )
            with training.autocast(self.options):
                states = model.vision_model(pixel_values=pixels).last_hidden_state
                seen = model.qformer(
                    query_embeds=model.query_tokens.expand(len(batch), -1, -1),
                    encoder_hidden_states=states,
                ).last_hidden_state
                soft = model.language_projection(seen)
                soft = soft.repeat_interleave(len(targets) // len(batch), 0)
                loss = self.written(soft.float(), ids, labels)
            trainer.step(number, {"text": loss})
        self.history["generation"] = trainer.history

    def picks(self, trainer: training.Trainer) -> Iterator[tuple[int, Tensor]]:
        """Yield (step, indices) of shuffled batches."""
        order = training.batches(len(self.plans), self.options.batch, self.generator)
        yield from zip(trainer.numbers(), order, strict=False)

    def pictures(self, trainer: training.Trainer) -> Iterator[tuple[int, Tensor, list[Plan]]]:
        """Yield (step, pixels, plans) of shuffled batches."""
        for number, picked in self.picks(trainer):
            pixels = training.normalize(self.images[picked].to(self.device))
            yield number, pixels, [self.plans[i] for i in picked.tolist()]

    def save(self) -> None:
        """Write the folder, fp16."""
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        limits = GenerationConfig(
            bos_token_id=2,
            pad_token_id=PAD,
            eos_token_id=self.texts.newline,
            max_new_tokens=40,
        )
        self.model.generation_config = limits
        self.model.cpu().half().save_pretrained(out)
        image_processor = BlipImageProcessor(
            size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
            image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_STD),
        )
        image_processor.save_pretrained(out)
        Blip2Processor(image_processor, self.tokenizer, QUERIES).save_pretrained(out)


def main() -> None:
    """Train, save, say how long it took."""
    parser = training.parser("train tiny-blip2", steps=1800, lr=2e-3, pictures=60_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vision-layers", type=int, default=5)
    parser.add_argument("--resume", type=Path, help="a folder to go on from; give 0 steps to skip")
    parser.add_argument("--vision-steps", type=int, default=800)
    parser.add_argument("--language-steps", type=int, default=1300)
    parser.add_argument("--representation-steps", type=int, default=250)
    options = parser.parse_args()
    started = time.perf_counter()
    training.setup(options)
    run = Run(options)
    print(f"tiny-blip2: {sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)
    for name, steps in run.steps.items():
        if steps:
            getattr(run, name)()
    run.save()
    training.write_record(options.out, options, started, {"loss": run.history})
    print(f"tiny-blip2: saved in {options.out}", flush=True)


if __name__ == "__main__":
    main()
