"""BLIP-2's first stage: the Q-Former learns to see, under three losses.

Li et al. 2023, arXiv 2301.12597, section 3.2. One self-attention stack holds queries and text; each
loss has its own mask (rows attend to columns):

                 queries  text           used by
    queries         x      -      image-text contrast: neither side sees the other
    queries         x      x      image-text matching: both see all
    text            x    causal   image-grounded generation: the queries see no text

The queries of the first and the third mask see the same, so these two losses share one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

DECODE, CLASSIFY, PAD = 0, 2, 1  # <s> starts text to be generated, </s> text to be compared
EMBED_SIZE = 64


class RepresentationStage(nn.Module):
    """A Q-Former with its text branch and the heads that only this stage needs.

    Args:
        config: of the Q-Former, with `use_qformer_text_input`.
        queries: float32 (1, queries, hidden), learned.
        vision_model: turns pixels into states; trained along.
    """

    def __init__(
        self, config: Blip2QFormerConfig, queries: nn.Parameter, vision_model: nn.Module
    ) -> None:
        super().__init__()
        self.queries, self.vision_model = queries, vision_model
        self.qformer = Blip2QFormerModel(config)
        self.embeddings = Blip2TextEmbeddings(config)
        self.vision_projection = nn.Linear(config.hidden_size, EMBED_SIZE)
        self.text_projection = nn.Linear(config.hidden_size, EMBED_SIZE)
        self.match_head = nn.Linear(config.hidden_size, 2)
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.temperature = nn.Parameter(torch.tensor(0.07).log())
        nn.init.normal_(self.embeddings.word_embeddings.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embeddings.weight, std=0.02)

    def forward(self, pixels: Tensor, captions: Tensor) -> dict[str, Tensor]:
        r"""The three losses.

        Args:
            pixels: float32 (batch, 3, 64, 64).
            captions: int64 (batch, tokens), each `</s> words... \n`, padded with `PAD`.
        """
        states = self.vision_model(pixel_values=pixels).last_hidden_state
        image, generation = self._generation(states, captions)
        text = self._text(captions)
        contrast, similarity = self._contrast(image, text, captions)
        return {
            "contrast": contrast,
            "generation": generation,
            "matching": self._matching(states, captions, similarity),
        }

    def _generation(self, states: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Query outputs, float (batch, queries, hidden), and the loss of writing the captions."""
        ids = captions.clone()
        ids[:, 0] = DECODE
        queries, tokens = self.queries.shape[1], ids.shape[1] - 1
        mask = torch.ones(queries + tokens, queries + tokens, dtype=torch.bool, device=ids.device)
        mask = mask.tril()
        mask[:queries, :queries] = True
        hidden = self._fused(states, ids[:, :-1], mask[None, None])
        written = hidden[:, queries:]
        logits = functional.linear(written, self.embeddings.word_embeddings.weight, self.word_bias)
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=PAD
        )
        return hidden[:, :queries], loss

    def _text(self, captions: Tensor) -> Tensor:
        hidden = self.qformer(
            query_embeds=self.embeddings(input_ids=captions),
            query_length=0,
            attention_mask=(captions != PAD)[:, None, None, :].expand(-1, 1, captions.shape[1], -1),
        ).last_hidden_state
        return functional.normalize(self.text_projection(hidden[:, 0]).float(), dim=-1)

    def _contrast(self, image: Tensor, text: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Contrast by each picture's best query; equal captions are not held apart."""
        queries = functional.normalize(self.vision_projection(image).float(), dim=-1)
        similarity = torch.einsum("iqd,td->itq", queries, text).amax(-1) / self.temperature.exp()
        same = (captions[:, None] == captions[None]).all(-1)
        same.fill_diagonal_(False)
        similarity = similarity.masked_fill(same, -1e4)
        target = torch.arange(len(similarity), device=similarity.device)
        loss = functional.cross_entropy(similarity, target)
        return (loss + functional.cross_entropy(similarity.T, target)) / 2, similarity.detach()

    def _matching(self, states: Tensor, captions: Tensor, similarity: Tensor) -> Tensor:
        """Tell a picture's caption from the hardest other one; half of the batch each."""
        half = len(captions) // 2
        weights = similarity[half:].softmax(-1) + 1e-6
        weights[:, half:].fill_diagonal_(0.0)
        wrong = torch.multinomial(weights, 1)[:, 0]
        texts = torch.cat([captions[:half], captions[wrong]])
        seen = functional.pad(texts != PAD, (self.queries.shape[1], 0), value=True)
        mask = seen[:, None, None, :].expand(-1, 1, seen.shape[1], -1)
        hidden = self._fused(states, texts, mask)
        logits = self.match_head(hidden[:, : self.queries.shape[1]]).float().mean(1)
        target = torch.zeros(len(texts), dtype=torch.long, device=texts.device)
        target[:half] = 1
        return functional.cross_entropy(logits, target)

    def _fused(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Queries and text through one stack: float (batch, queries + tokens, hidden)."""
        queries = self.queries.expand(len(ids), -1, -1)
        hidden: Tensor = self.qformer(
            query_embeds=self.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask.expand(len(ids), -1, -1, -1),
            encoder_hidden_states=states,
        ).last_hidden_state
        return hidden
