"""`forward` and `generate` with images, for every language model LLaVA is built on."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from llava.compress.attach import exclusive
from llava.compress.base import Compressor
from llava.compress.trace import GenerationClock, Trace
from llava.constants import PromptTooLong
from llava.model.language_model.branches import Branches, branching
from llava.model.language_model.inside import drop_inside
from llava.model.language_model.prefix import SharedPrefix
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.switch import as_method


class ImageGeneration(LlavaMetaForCausalLM):
    """Stands before a causal language model of transformers and hands it compressed sequences."""

    generation_config: Any
    state_dict: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Run the language model; `labels` are aligned with `input_ids` and follow the compression.

        Everything but `images` and `image_sizes` means what it means for the language model itself. That
        `logits_to_keep` is named here tells transformers' `generate` to ask for the logits of the last position only.
        """
        if inputs_embeds is None and input_ids is not None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
                )
            )
        if isinstance(past_key_values, Branches):
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            attention_mask = past_key_values.visible(attention_mask, tokens)
        with exclusive(self.get_model().layers):
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )

    def save_pretrained(self, save_directory: Any, *, state_dict: Any = None, **kwargs: Any) -> None:
        """Save under the published names, so that other LLaVA code reads the tower too (transformers dropped a level).

        Arguments are those of transformers' `save_pretrained`.
        """
        ours, published = "vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."
        state = self.state_dict() if state_dict is None else state_dict
        state = {name.replace(ours, published): tensor for name, tensor in state.items()}
        super().save_pretrained(  # type: ignore[misc]
            save_directory, state_dict=state, save_original_format=False, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        trace: Trace | None = None,
        method: Compressor | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer prompts `[B, L]`; returns new tokens only.

        Several threads may call it: they take turns in the tower and in the language model.

        Args:
            inputs: ids, IMAGE_TOKEN_INDEX where an image goes; padded on either side, if `attention_mask` says where.
            images: as in `compress_images`, in the order of the placeholders; None for prompts without images.
            image_sizes: `(width, height)` of every image in pixels.
            input_ids: the same as `inputs`.
            attention_mask: `[B, L]`; None: every id is a token.
            trace: filled with what happened, if given.
            method: compression method for this call, or its name or call; None: the model's.
            **kwargs: for transformers' `generate`. Where they do not say how long an answer may get, the generation
                config does: `max_new_tokens`, or `max_length` with the prompt and its images counted; else it ends
                where the model does, at EOS or at `config.max_position_embeddings`.

        Raises:
            InputError: see `splice_images`; or no room is left for an answer.
        """
        ids = inputs if inputs is not None else input_ids
        if ids is None or "inputs_embeds" in kwargs:
            raise NotImplementedError("generate takes ids and images; inputs_embeds are made from them")
        method = as_method(self.method if method is None else method)  # once: another thread may change the model's
        s = self.splice_images(ids, attention_mask, None, images, image_sizes, "left", trace, method)
        steps = GenerationClock(trace, s.inputs_embeds.device)
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), *steps.criteria]
        with drop_inside(self.get_model(), method, s) as session, steps:
            if session.points:  # what the hooks remember between steps, a compiled step would take for constant
                kwargs["disable_compile"] = True
            answer = self._continue(inputs_embeds=s.inputs_embeds, attention_mask=s.attention_mask, **kwargs)
        session.check()
        if trace:
            trace.visual_per_layer += session.ran
        return answer

    @torch.no_grad()
    def generate_after(
        self, prefix: SharedPrefix, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Answer prompts `[U·R, L]` of text that continue what `prefix` holds, R prompts each; new tokens only.

        Args:
            prefix: U beginnings, images included; it stays as it is.
            input_ids: the rest of every prompt, padded on either side, if `attention_mask` says where; prompt r of
                beginning u is row u·R + r.
            attention_mask: `[U·R, L]`; None: every id is a token.
            **kwargs: for transformers' `generate`; beams are not possible.
        """
        rest = self.splice_images(input_ids, attention_mask, padding_side="left")
        rows = len(input_ids) // len(prefix.mask)
        mask = prefix.mask.repeat_interleave(rows, 0)
        # transformers wants the whole sequence and takes its cached part from the cache, whatever stands there.
        cached = rest.inputs_embeds.new_zeros(*mask.shape, rest.inputs_embeds.shape[2])
        with branching(self.get_model()):
            return self._continue(
                inputs_embeds=torch.cat((cached, rest.inputs_embeds), 1),
                attention_mask=torch.cat((mask, rest.attention_mask), 1),
                past_key_values=Branches(prefix.cache, rows),
                **kwargs,
            )

    def _continue(self, **kwargs: Any) -> Any:
        """Call transformers' `generate` on embeddings."""
        kwargs.pop("position_ids", None)  # they follow from the mask
        kwargs = self._until(kwargs)
        settings = kwargs.get("generation_config") or self.generation_config
        if not kwargs.get("do_sample", settings.do_sample):
            # Callers pass temperature=0 for greedy search; transformers warns about settings greedy search ignores.
            kwargs = {key: value for key, value in kwargs.items() if key not in ("temperature", "top_p", "top_k")}
        return super().generate(**kwargs)  # type: ignore[misc]

    def _until(self, given: dict[str, Any]) -> dict[str, Any]:
        """Settle where answers end, as transformers does, but for its 20 tokens where nobody says; see `generate`.

        All is said as `max_length`, since transformers warns of callers' `max_new_tokens` beside a checkpoint's own.
        """
        prompt, asked, own = given["inputs_embeds"].shape[1], given.get("generation_config"), self.generation_config
        sources = (given, vars(asked) if asked else {}, vars(own))

        def said(name: str) -> int | None:
            return next((found for source in sources if (found := source.get(name)) is not None), None)

        new, total = said("max_new_tokens"), said("max_length") or self.config.max_position_embeddings
        if new is not None:
            total = prompt + new
        if total <= prompt:
            raise PromptTooLong(
                f"the prompt is {prompt} tokens long with its images, which leaves no room for an answer within "
                f"{total}; give max_new_tokens, a greater max_length or a lower retention ratio"
            )
        if asked is None or given.keys() & {"max_new_tokens", "max_length"}:
            return given | {"max_new_tokens": None, "max_length": total}
        asked = copy(asked)
        asked.max_length, asked.max_new_tokens = total, None if own.max_new_tokens is None else new
        return given | {"generation_config": asked}
