"""A language model that sees: an image's tokens, a linear projector, and any causal language model behind it.

    e = [E(x_<), P f(image), E(x_>)]         f an image encoder's hidden states, P (d, d_image), E the word embeddings

`model.backbone = "<image encoder> + <language model>"`. The image encoder is frozen and never adapted, so its tokens
are part of how a row is read (`celora.models.seeing`), made once. P is drawn at random, whatever the two are called,
and is trained as heads are.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from celora.models.language import takes_positions
from celora.rng import generator

PROJECTOR = "projector"


class ComposedModel(nn.Module):
    """The language model without its head, and the projector before it.

    Attributes:
        placeholder: the id that stands for a token of an image: one beyond the vocabulary.
    """

    main_input_name = "input_ids"

    def __init__(self, language: Any, width: int) -> None:
        super().__init__()
        self.config, self._at = language.config, language.base_model_prefix
        self.add_module(self._at, language.base_model)  # its path is that in the language model's own class
        self.placeholder: int = language.get_input_embeddings().num_embeddings
        hidden = language.get_input_embeddings().embedding_dim
        self.projector = nn.Linear(width, hidden)
        draw, bound = generator(0, PROJECTOR, hidden, width), 1 / math.sqrt(width)
        with torch.no_grad():
            for weight in self.projector.parameters():
                weight.copy_((2 * torch.rand(weight.shape, generator=draw) - 1) * bound)

    def get_decoder(self) -> Any:
        """The language model's transformer."""
        return self.get_submodule(self._at)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """Hidden states of rows (rows, t), where `placeholder` stands for the tokens (rows, n, d_image) of an image."""
        language = self.get_decoder()
        seen = input_ids == self.placeholder
        words = language.get_input_embeddings()(input_ids.masked_fill(seen, 0))
        if pixel_values is not None:
            tokens = self.projector(pixel_values).to(words.dtype)
            words = words.masked_scatter(seen.unsqueeze(-1), tokens)
        if position_ids is not None and takes_positions(language.forward):
            more["position_ids"] = position_ids
        return language(inputs_embeds=words, **more)


class Composed(nn.Module):
    """The whole, as transformers' own models of images and texts present themselves."""

    base_model_prefix = ""

    def __init__(self, language: Any, width: int) -> None:
        super().__init__()
        self.base_model = ComposedModel(language, width)
        self.language = language
        self.config, self.generation_config = language.config, language.generation_config

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        found: nn.Module = self.language.get_output_embeddings()
        return found

    def forward(self, **inputs: Any) -> Any:
        """Of texts alone, as the language model makes it."""
        return self.language(**inputs)
