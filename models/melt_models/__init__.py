"""PyTorch definitions of MELT and of the LoopLM that it starts from, checkpoints and training.

Importing this package registers ``model_type: melt`` with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from melt_models.checkpoint import CheckpointError, load_checkpoint
from melt_models.configuration import GATE_KINDS, MeltConfig
from melt_models.modeling import KVCache, MeltCausalLM, MeltOutput

AutoConfig.register(MeltConfig.model_type, MeltConfig, exist_ok=True)
AutoModelForCausalLM.register(MeltConfig, MeltCausalLM, exist_ok=True)

__all__ = [
    "GATE_KINDS",
    "CheckpointError",
    "KVCache",
    "MeltCausalLM",
    "MeltConfig",
    "MeltOutput",
    "load_checkpoint",
]
