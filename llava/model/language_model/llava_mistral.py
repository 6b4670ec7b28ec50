"""LLaVA on Mistral."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.generation import ImageGeneration
from llava.model.language_model.multimodal import MultimodalFields
from llava.model.llava_arch import LlavaMetaModel


class LlavaMistralConfig(MultimodalFields, MistralConfig):
    """Mistral's config with LLaVA's keys."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral without its head, with tower, projector and newline embedding."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(ImageGeneration, MistralForCausalLM):
    """LLaVA on Mistral: `generate` and `forward` take images."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig) -> None:
        """Build the model from its config; weights come from `load_pretrained_model`."""
        # Not MistralForCausalLM's own, which would build a second, imageless model first.
        super(MistralForCausalLM, self).__init__(config)
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_mistral", LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
