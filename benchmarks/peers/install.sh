#!/usr/bin/env bash
# Installs llama.cpp, ONNX Runtime GenAI and torch into an environment of their own: build/peers/venv.
# llama.cpp is compiled here, which takes some minutes: for x86 with AVX-512 VNNI and without AMX, whose kernels crashed
# where this was tried. For another processor set CMAKE_ARGS, for example to -DGGML_NATIVE=ON.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
venv=build/peers/venv
"$python" -m venv "$venv"
pip=("$venv/bin/pip" install --disable-pip-version-check --quiet)
"${pip[@]}" torch==2.13.0 "transformers>=5,<6" onnx onnx_ir numpy
"${pip[@]}" gguf==0.19.0 onnxruntime-genai==0.18.0
amx_free="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
amx_free="$amx_free -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON"
export CMAKE_ARGS="${CMAKE_ARGS:-$amx_free}"
CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "${pip[@]}" --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
"${pip[@]}" "llama-cpp-python[server]==0.3.36"
"$venv/bin/python" -c 'import llama_cpp, onnxruntime_genai, gguf, torch; print("peers are installed")'
