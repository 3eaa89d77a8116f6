# Everything from nothing but Python 3.10+ and make. `make demo` is the place to start.
PYTHON ?= python3
ASSETS ?= $(or $(TUTELAGE_ASSETS),.assets)
BIN := .venv/bin

.PHONY: demo test test-assets lint teacher assets clean

demo: .venv/.installed  ## distil a small student from the embedded teacher, then compare it with one-shot distillation
	$(BIN)/python examples/demo.py demo-output

test: .venv/.installed-dev  ## every test that needs no download
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-assets: assets  ## the tests on real teachers and texts
	TUTELAGE_ASSETS="$(ASSETS)" $(BIN)/python -m pytest -m assets

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

assets: .venv/.installed-dev  ## download real teachers and texts (about 180 MB) and convert them
	$(BIN)/python scripts/fetch_assets.py --dir "$(ASSETS)"
	$(BIN)/python scripts/convert_smollm2.py --dir "$(ASSETS)"

teacher: .venv/.installed  ## train the embedded teacher again
	$(BIN)/tutelage distill --config configs/austen_teacher.yaml

clean:
	rm -rf .venv demo-output build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,gguf,peft,report,sentence-transformers]'
	touch $@ .venv/.installed
