"""The CLIP tower: all layers up to the one whose output LLaVA reads, and not one more."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.anyres import AnyResGrid
from llava.compress.attach import attach, exclusive
from llava.compress.base import Compressor, Layout, Views
from llava.constants import InputError
from llava.model.multimodal_encoder.builder import TOWER_REMEDY, image_processor, vision_config
from llava.model.weights import load_model, refuse


class CLIPVisionTower(nn.Module):
    """CLIP's vision model as LLaVA uses it: the patches of `hidden_states[select_layer]`.

    Built from a config, never with weights of its own: LLaVA-NeXT checkpoints carry a tuned tower, which arrives with
    the rest of their weights; for LLaVA-1.5 the builder calls `load_model`. The inner model is transformers' own class
    and not a subclass, as only then its checkpoint names (`vision_model.…`) are translated on load and save.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        """Build the tower.

        Args:
            vision_tower: folder or hub id of the CLIP model.
            args: the model config; gives `mm_vision_select_layer`, `mm_vision_select_feature` and, where known, the
                shape as `mm_vision_config`.
            delay_load: accepted for compatibility; weights are never loaded here.

        Raises:
            InputError: the config asks for features other than patches.
        """
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = args.mm_vision_select_feature
        if self.select_feature != "patch":
            raise InputError(f"mm_vision_select_feature must be 'patch', got {self.select_feature!r}")
        shape = CLIPVisionConfig(**(args.mm_vision_config or vision_config(vision_tower)))
        shape._attn_implementation = args._attn_implementation or "sdpa"
        self.vision_tower = CLIPVisionModel(shape)
        self.image_processor = image_processor(vision_tower, shape.image_size)
        self.is_loaded = False

    def load_model(self, device_map: Any = None) -> None:
        """Fill the tower with the weights of `vision_tower_name`, in the tower's own dtype and place.

        Raises:
            InputError: the weights cannot be had.
        """
        name = self.vision_tower_name
        try:
            source, missing, _ = load_model(CLIPVisionModel, name, dtype=self.dtype)
        except InputError as error:
            raise InputError(f"vision tower {name!r}: {error}; {TOWER_REMEDY}") from error
        own, found = self.vision_tower.state_dict(), source.state_dict()
        misshapen = [key for key in own if key in found and own[key].shape != found[key].shape]
        refuse({"missing": missing | (own.keys() - found.keys()), "misshapen": misshapen}, name)
        self.vision_tower.load_state_dict({key: found[key] for key in own})
        self.is_loaded = True

    @property
    def depth(self) -> int:
        """Number of encoder layers that are run; the features are the input of the next."""
        layers = self.config.num_hidden_layers
        return self.select_layer if self.select_layer >= 0 else layers + 1 + self.select_layer

    def hidden(self, pixels: Tensor) -> Tensor:
        """Encode views `[V, 3, S, S]` into the input of layer `depth`: `[V, 1 + N, C]`, [CLS] first."""
        clip = self.vision_tower
        with exclusive(clip.encoder.layers):
            hidden = clip.pre_layrnorm(clip.embeddings(pixels.to(self.device, self.dtype)))
            for layer in clip.encoder.layers[: self.depth]:
                hidden = layer(hidden, attention_mask=None)
        return hidden

    def views(
        self, pixels: Sequence[Tensor], grids: Sequence[AnyResGrid], layout: Layout, method: Compressor
    ) -> list[Views]:
        """Encode the views `[V, 3, S, S]` of several images in one call, and record what a method looks at.

        Raises:
            InputError: the method cannot meet its ratio in this tower.
        """
        # Moved before it is cast, as a cast on the host would wait and leave page-locked memory.
        moved = [image.to(self.device, non_blocking=image.is_pinned()).to(self.dtype) for image in pixels]
        at_work = attach(tower=self.vision_tower, method=method, depth=self.depth, grids=grids, layout=layout)
        with at_work as session:
            hidden = self.hidden(torch.cat(moved))
            session.finish(self.depth, hidden)
        return session.views(hidden, grids, layout)

    def compile_layers(self, **options: Any) -> None:
        """Let `torch.compile` make every layer that is run faster, in place; options are its own."""
        for layer in self.vision_tower.encoder.layers[: self.depth]:
            layer.compile(**options)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Encode views `[V, 3, S, S]` into patch features `[V, N, C]` in the dtype of the input; a list one by one."""
        if isinstance(images, list):
            return [self.hidden(image[None])[:, 1:].to(image.dtype) for image in images]
        return self.hidden(images)[:, 1:].to(images.dtype)

    @property
    def config(self) -> CLIPVisionConfig:
        """Shape of the CLIP model."""
        return self.vision_tower.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.device

    @property
    def hidden_size(self) -> int:
        """Width of the features (C)."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of a view (S)."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a view (N)."""
        return self.num_patches_per_side**2

    @property
    def dummy_feature(self) -> Tensor:
        """A zero feature `[1, C]`."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)
