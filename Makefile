# Runs from a checkout with Python 3.11 or newer; everything else comes from the package registry
# into .venv.
#
#   make demo    describe a throwaway library with a tiny model; see tests/sandbox.py
#   make demo HOSTS=http://127.0.0.1:11434 ARGS="--interface ollama --model-name NAME"
#   make demo REPORT=photos.html
#                keep its page, with the photos and their descriptions, in this file
#   make check   judge and test what can be tested in half a minute: all but the tests marked
#                `slow` or `long`
#   make test    what CI runs: all but the tests marked `long`; ARGS=... goes to pytest
#   make lowest  the same tests with exactly the lowest versions of pyproject.toml
#   make faults  the tests marked `long` and more examples of properties, then break everything
#                around the service for some minutes; see tests/faults.py
#   make bench   measure; see tests/bench.py
#   make clean   remove .venv and what the tools leave behind

PYTHON ?= python3
IN_VENV = .venv/bin/python

# pytest keeps the tests as it rewrites them; otherwise each of its processes does so at each start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check ready lint rewritten test lowest faults bench clean

demo: .venv/sandbox
	@$(IN_VENV) tests/sandbox.py $(ARGS)

ready: .venv/dev
	@$(MAKE) --no-print-directory --jobs=2 lint rewritten

lint: .venv/dev
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m mypy

# In a new clone: once, and beside mypy, instead of in each process of pytest. What is wrong with a
# test is said when it is run.
rewritten: .venv/dev
	@$(IN_VENV) -m pytest --collect-only -q >/dev/null || true

check: ready
	$(IN_VENV) -m pytest -n auto -m "not long and not slow" $(ARGS)

test: ready
	$(IN_VENV) -m coverage run --parallel-mode -m pytest -n auto $(ARGS)
	$(IN_VENV) -m coverage combine --quiet
	$(IN_VENV) -m coverage report

lowest: .venv-lowest/dev
	.venv-lowest/bin/python -m pytest -n auto $(ARGS)

faults: .venv/dev
	$(IN_VENV) -m pytest -n auto -m long
	EXAMPLES=6 $(IN_VENV) -m pytest -n auto tests/test_properties.py
	@$(IN_VENV) tests/faults.py $(ARGS)

bench: .venv/dev
	@$(IN_VENV) tests/bench.py $(ARGS)

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache

# One stamp for each extra of pyproject.toml.
.venv/sandbox .venv/dev .venv-lowest/dev: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "make: $(PYTHON) is not Python 3.11 or newer with venv (Debian: python3-venv);" \
	"name another one: make PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(@D) ..."
	@$(PYTHON) -m venv $(@D)
	@$(if $(findstring lowest,$@),grep -oE '[a-z0-9-]+>=[0-9.]+' $<,true) | sed 's/>=/==/' > $(@D)/constraints
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint $(@D)/constraints --editable ".[$(@F)]"
	@touch $@
