# make demo        a first result in a minute: every method on two tiny models of this repository, on a CPU
# make demo-full   the same with more bit widths, three seeds and two tasks, some minutes
# make test        all tests, about 7 minutes on 2 cores;  make test-quick: those that take no time, under a minute
# make real        a real model, hours; DATA=FOLDER has the text
# Each first installs into .venv, once.  PYTHON: the Python to make .venv with, 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --progress-bar off
LARGE := awk '/^ *(Downloading|Using cached) .*[0-9] [MG]B/ {print "   " $$0; fflush()}'  # of what pip prints, the packages over 1 MB
TORCH := $(shell grep ^torch== requirements.txt)
SHELL := bash
.SHELLFLAGS := -eo pipefail -c

.PHONY: demo demo-full test test-quick real lint clean

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	@echo "Installing into .venv, once: 0.6 GB to load and 2.6 GB on disk with PyTorch for CPUs, several GB more with that for NVIDIA GPUs"
	@$(PYTHON) -m venv .venv
	@echo "1 of 2: $(TORCH)"
	@$(PIP) "$(TORCH)" | $(LARGE)
	@echo "2 of 2: the rest of requirements.txt"
	@$(PIP) -r requirements.txt | $(LARGE)
	@echo "Installed: $$(du -sh .venv | cut -f1) in .venv"
	@touch $@

demo: .venv/ready
	@$(PY) demo/run.py

demo-full: .venv/ready
	$(PY) demo/run.py --full

real: .venv/ready models/smollm2/config.json
	PYTHON=$(abspath $(PY)) bash scripts/real.sh $(if $(DATA),--data_dir $(DATA))
	$(PY) scripts/plot_losses.py out/real/smollm2 --out out/real/smollm2.png

models/smollm2/config.json: | .venv/ready
	$(PIP) gguf==0.19.0 | $(LARGE)
	$(PY) scripts/real_model.py models/smollm2

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadgroup

test-quick: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadgroup -m "not slow and not gpu"

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
