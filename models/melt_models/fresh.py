"""A new LoopLM with random weights, to be trained from nothing."""

from torch import nn

from melt_models.configuration import MeltConfig
from melt_models.modeling import MeltCausalLM

BRANCH_SCALE = 0.3


def new_looplm(config: MeltConfig) -> MeltCausalLM:
    """Random weights; a layer's branches start as large as the embeddings, so as not to drown a token's identity."""
    model = MeltCausalLM(config)
    for layer in model.model.layers:
        nn.init.constant_(layer.input_layernorm_2.weight, BRANCH_SCALE)
        nn.init.constant_(layer.post_attention_layernorm_2.weight, BRANCH_SCALE)
    return model
