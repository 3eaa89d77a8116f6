# Everything from nothing but Python 3.10+ and make. `make demo` is the place to start.
PYTHON ?= python3
ASSETS ?= $(or $(TUTELAGE_ASSETS),.assets)
BIN := .venv/bin
DEV := .[dev,gguf,peft,report,sentence-transformers]
NEWEST := 'transformers<6'
# What the oldest and the newest environment have in other versions than constraints.txt.
VARIED := ^(accelerate|huggingface_hub|tokenizers|transformers)==

.PHONY: demo test test-versions test-lowest test-newest test-architectures test-assets lint teacher assets clean

demo: .venv/.installed  ## distil a small student from the embedded teacher, then compare it with one-shot distillation
	$(BIN)/python examples/demo.py demo-output

test: .venv/.installed-dev  ## every test that needs no download
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-versions: test-lowest test-newest  ## the same tests on the oldest and the newest transformers that pyproject.toml allows

test-lowest: .venv-lowest/.installed-dev
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2

test-newest: .venv/.installed-dev
	@found=$$($(BIN)/python -m pip install --dry-run --no-deps --upgrade $(NEWEST)) || exit 1; \
	case "$$found" in \
	  *"Would install"*) $(MAKE) test-upgraded ;; \
	  *) echo "constraints.txt has the newest transformers: \`make test\` covers it" ;; \
	esac

.PHONY: test-upgraded
test-upgraded:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	grep -vE '$(VARIED)' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install -q --upgrade -c .venv-newest/constraints.txt -e '$(DEV)' $(NEWEST)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2

test-assets: assets  ## the tests on real teachers and texts
	TUTELAGE_ASSETS="$(ASSETS)" $(BIN)/python -m pytest -m assets

test-architectures: .venv/.installed-dev  ## every architecture of transformers, built small
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m architectures

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

assets: .venv/.installed-dev  ## download real teachers and texts (about 250 MB) and convert them
	$(BIN)/python scripts/fetch_assets.py --dir "$(ASSETS)"
	$(BIN)/python scripts/convert_smollm2.py --dir "$(ASSETS)"

teacher: .venv/.installed  ## train the embedded teacher again
	$(BIN)/tutelage distill --config configs/austen_teacher.yaml

clean:
	rm -rf .venv .venv-lowest .venv-newest demo-output build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '$(DEV)'
	touch $@ .venv/.installed

.venv-lowest/.installed-dev: pyproject.toml constraints.txt constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	grep -vE '$(VARIED)' constraints.txt | cat - constraints-lowest.txt > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install -q -c .venv-lowest/constraints.txt -e '$(DEV)'
	touch $@
