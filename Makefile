# make demo: all six methods on the embedded demo models.  make test: the tests.  Both first make .venv, which needs only Python 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== requirements.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(PY) demo/run.py

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
