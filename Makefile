# make demo: all six methods on the embedded demo models.  make test: the tests.  make real: a real model, hours; DATA=FOLDER has the text.
# Each first makes .venv, which needs only Python 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test real lint clean

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== requirements.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(PY) demo/run.py

real: .venv/ready models/smollm2/config.json
	PYTHON=$(abspath $(PY)) bash scripts/real.sh $(if $(DATA),--data_dir $(DATA))
	$(PY) scripts/plot_losses.py out/real/smollm2 --out out/real/smollm2.png

models/smollm2/config.json: | .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check gguf==0.19.0
	$(PY) scripts/real_model.py models/smollm2

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
