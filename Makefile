# Every target makes its own .venv first; a fresh machine needs Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= runs
# One process a core with one thread each is faster for small tensors than all cores in each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: help install quickstart test test-fast test-exhaustive mutants check format docs containers wheel bench proto clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(STAMP)  ## Make .venv with the tested versions

# torch comes first and alone: the pinned build satisfies every later range, so nothing else
# can pull in another one. torchvision lies in a folder of its own, where only the test that reads
# image folders with it finds it: its build does not go with the CPU build of torch.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[simulations,evaluation,study,ray]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/torchvision torchvision
	touch $@

quickstart: $(STAMP)  ## Three hospitals train one generator (about ten minutes on two cores)
	$(BIN)/crafts-sim run quickstart --out $(RUNS)/quickstart

test: $(STAMP)  ## The whole suite (about a quarter of an hour on two cores)
	$(PYTEST) -m "not exhaustive"

test-fast: $(STAMP)  ## Without the slow tests (two minutes)
	$(PYTEST) -m "not slow and not exhaustive"

test-exhaustive: $(STAMP)  ## What is repeated more often than the suite has time for
	$(PYTEST) -m exhaustive

mutants: $(STAMP)  ## Take each guarantee out of the code, one at a time; write which test noticed
	$(BIN)/python tests/support/code_mutants.py benchmarks/results/mutants-$$(date +%F).md

check: $(STAMP)  ## Format, lint, types, import contract; Helm and Kubernetes about the chart, if installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! $(BIN)/python -c 'import helm_python, kubernetes_validate' 2>/dev/null || $(BIN)/python -m pytest -q tests/deploy/test_deploy.py -k chart

format: $(STAMP)  ## Format and sort in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## The documentation as a site in dist/site; a dead link fails
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

containers: $(STAMP)  ## Build both images, run a study in them, ask Helm and Kubernetes about the chart
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group deploy
	$(BIN)/python -m pytest tests/deploy
	deploy/check $(CHECK)

wheel: $(STAMP)  ## What sites install: the wheel, its hash, and all it was tested with (CycloneDX)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group release
	$(BIN)/python -m build --wheel --outdir dist/wheel .
	cp constraints.txt dist/wheel/
	$(BIN)/cyclonedx-py environment --output-reproducible --output-file dist/wheel/sbom.cdx.json $(BIN)/python
	cd dist/wheel && sha256sum *.whl constraints.txt sbom.cdx.json > SHA256SUMS

bench: $(STAMP)  ## Benchmarks that print ratios
	$(BIN)/python benchmarks/private_step.py
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/network_round.py
	$(BIN)/python benchmarks/coordinator_memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/secure_sum.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/distributed_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ingest_speed.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_reads.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling_speed.py

proto: $(STAMP)  ## Regenerate the registrar's messages from its contract
	$(BIN)/python -m pip install --quiet --target .proto-tools "grpcio-tools==1.76.0"
	PYTHONPATH=.proto-tools $(BIN)/python -m grpc_tools.protoc -I crafts_core --python_out=crafts_core --pyi_out=crafts_core crafts_core/crafts_core/registrar/registrar.proto
	rm -rf .proto-tools

clean:  ## Remove what the targets made
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
