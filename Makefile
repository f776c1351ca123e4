# make quickstart | test | bench. Each makes .venv first if need be; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# constraints.txt holds the exact versions; they are installed as wheels, from whatever index pip is set up with.
INSTALLED = $(VENV)/installed

.PHONY: quickstart test bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# FLAGS and EVAL_FLAGS from the command line or the environment go to train and to eval.
quickstart: $(INSTALLED)
	$(BIN)/jaxlm train --config=configs/quickstart.py --workdir=runs/quickstart $(FLAGS)
	$(BIN)/jaxlm eval --workdir=runs/quickstart --baselines --json=runs/quickstart/eval.json $(EVAL_FLAGS)
	$(BIN)/jaxlm generate --workdir=runs/quickstart --prompt='def read_config(path):' --max_length=80

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/gpt2_step.py

clean:
	rm -rf $(VENV) build *.egg-info
