#!/usr/bin/env bash
# Installs llama.cpp, ONNX Runtime GenAI and torch into an environment of their own: build/peers/venv.
# llama.cpp is compiled for this machine's processor, which takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
venv=build/peers/venv
"$python" -m venv "$venv"
pip=("$venv/bin/pip" install --disable-pip-version-check --quiet)
"${pip[@]}" torch==2.13.0 "transformers>=5,<6" onnx onnx_ir numpy
"${pip[@]}" gguf==0.19.0 onnxruntime-genai==0.18.0
CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "${pip[@]}" --no-binary llama-cpp-python llama-cpp-python==0.3.36
"$venv/bin/python" -c 'import llama_cpp, onnxruntime_genai, gguf, torch; print("peers are installed")'
