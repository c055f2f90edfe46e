# make run    starts LoRA Pilot: http://127.0.0.1:7878
# make demo   trains a first small LoRA with it, from nothing, and shows where the file lies
# make test   the tests;  make check  style, types, settings and migrations
# make learn  does a LoRA learn what it is shown? Three concepts, three seeds and a control each; about half an hour
# make chaos  kills, cuts and fills what can be while the real trainer trains, and compares everything; about half an hour. SEED=1 ROUNDS=1
#
# Needs Python 3.11 or newer with its venv module, and make. Everything else goes into .venv.
#   PYTHON=python3.12            another Python
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu     PyTorch for another GPU or for none (a smaller download)
#   PIP_ARGS=…  PYTEST_ARGS=…    handed on to pip and pytest

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell grep -m1 '^torch==' requirements.txt)
PACKAGES := lorapilot datasets models_registry runs lora_trainer

.PHONY: run demo test check learn chaos
.DELETE_ON_ERROR:

run: .venv/.installed
	$(BIN)/python manage.py up

demo: .venv/.installed
	$(BIN)/python manage.py demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

learn: .venv/.installed
	$(BIN)/python -m benchmarks.learning

chaos: .venv/.installed-dev
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --rounds $(or $(ROUNDS),1) $(CHAOS_ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES) manage.py
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python manage.py check --fail-level WARNING
	$(BIN)/python -m pytest -q tests/test_layers.py

# The stamps are older than the requirements when there is something to install.
.venv/.installed: requirements.txt | .venv/bin/python
	@echo "Installing $(TORCH) and the rest of requirements.txt into .venv. The first time this takes some minutes."
	$(BIN)/python -m pip install $(PIP_ARGS) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name yours: make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version) is too old: LoRA Pilot needs Python 3.11 or newer. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
