"""LLaVA on Llama and Vicuna."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.generation import ImageGeneration
from llava.model.language_model.multimodal import MultimodalFields
from llava.model.llava_arch import LlavaMetaModel


class LlavaConfig(MultimodalFields, LlamaConfig):
    """Llama's config with LLaVA's keys."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama without its head, with tower, projector and newline embedding."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(ImageGeneration, LlamaForCausalLM):
    """LLaVA on Llama: `generate` and `forward` take images."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        """Build the model from its config; weights come from `load_pretrained_model`."""
        # Not LlamaForCausalLM's own, which would build a second, imageless model first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
