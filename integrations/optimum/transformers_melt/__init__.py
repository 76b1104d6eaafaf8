"""MELT for optimum's exporter: importing this package registers ``model_type: melt`` with transformers and optimum.

``optimum-cli`` imports it by itself. The exported folder needs neither this package nor any other of ours. The name
begins with ``transformers`` because optimum tells by that whose model a class is.

``ORT_DISABLE_TELEMETRY`` is set here, as ONNX Runtime reads it at its import: official builds from 1.29 on send
telemetry to Microsoft otherwise. ``ORT_DISABLE_TELEMETRY=0`` keeps it.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from transformers import AutoConfig, AutoModelForCausalLM

from transformers_melt.modeling import MeltConfig, MeltForCausalLM
from transformers_melt.onnx_config import MeltOnnxConfig

AutoConfig.register(MeltConfig.model_type, MeltConfig, exist_ok=True)
AutoModelForCausalLM.register(MeltConfig, MeltForCausalLM, exist_ok=True)

__all__ = ["MeltConfig", "MeltForCausalLM", "MeltOnnxConfig"]
