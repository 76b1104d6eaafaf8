"""Runs in GenAI's own environment: FOLDER and prompt ids as JSON in, 200 greedy tokens as JSON out."""

import json
import os
import sys

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the next import
import onnxruntime_genai

model = onnxruntime_genai.Model(sys.argv[1])
parameters = onnxruntime_genai.GeneratorParams(model)
parameters.set_search_options(max_length=512)
generator = onnxruntime_genai.Generator(model, parameters)
generator.append_tokens(np.array(json.loads(sys.argv[2]), dtype=np.int32))
tokens: list[int] = []
while len(tokens) < 200 and not generator.is_done():
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
print(json.dumps(tokens))
