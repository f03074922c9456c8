PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RAY = .venv-ray
OPTUNA_2 = .venv-optuna-2
BENCHMARKS = loop_overhead inference memory_prediction start_to_end collect_scale planning

# Where this is set, each process compiles torch, transformers and peft anew: twice the time of a short command.
export PYTHONDONTWRITEBYTECODE =

.PHONY: install demo test gpu gpu-bench kernels oldest newest check slow reference docs gallery gallery-quick

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## the sweep of the README on the embedded model, then its table and plots
	$(BIN)/peftsweep method=lora method.r=8,16,32 quant=4bit -m
	$(BIN)/peftsweep-collect

test: install  ## the fast tier
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

gpu: install  ## the tests that need a GPU, four at a time on it
	$(BIN)/python -m pytest -q -m gpu -n 4

gpu-bench: install  ## eight minutes on a GPU: its tests, checks and measurements; ONLY=gpu_tests,packs takes some of them, SKIP= leaves some out
	$(BIN)/python benchmarks/gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(SKIP),--skip $(SKIP))

# An environment $(1) of the versions that uv resolves to with the options $(2), called $(3) in docs/tested_on.md. torch stays that of constraints.txt:
# of other versions package indexes offer builds for CUDA only, of several gigabytes.
define versions
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet uv
	$(1)/bin/uv pip compile --quiet --no-header --no-annotate $(2) --extra dev pyproject.toml \
		| grep -vE '^(torch|triton|nvidia-.*)==' > $(1)/versions.txt
	grep '^torch==' constraints.txt >> $(1)/versions.txt
	$(1)/bin/pip install --quiet --no-compile -c $(1)/versions.txt -e '.[dev]'
	$(1)/bin/python tests/tested_on.py --versions $(3)
endef

oldest:  ## the fast tests with the lowest versions that pyproject.toml allows
	$(call versions,.venv-oldest,--resolution lowest-direct,lowest)

newest:  ## the fast tests with the highest versions that pyproject.toml allows
	$(call versions,.venv-newest,--resolution highest,highest)

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The studies of gallery/, and what makes a part of each. MODELS and DATA name folders where no hub is reached, PEFT a checkout of it.
STUDIES = ranks methods chat encoder import
quick_ranks = seed=0 method.r=2,32 quant=none train.steps=30 eval.arc_easy.samples=30 eval.perplexity.samples=30
quick_methods = method=lora,full train.learning_rate_scale=10 halving.min_steps=null train.steps=10 eval.arc_easy.samples=20 eval.perplexity.samples=20
quick_chat = dataset.turns=all train.learning_rate=1e-3 train.steps=20 eval.calls.samples=16 eval.answers.samples=16
quick_encoder = seed=0 eval.sst2.samples=200

gallery: install  ## runs the studies of the gallery whole, and copies their answers into it
	for study in $(STUDIES); do PATH="$(CURDIR)/$(BIN):$$PATH" sh gallery/$$study/run.sh || exit 1; done
	PATH="$(CURDIR)/$(BIN):$$PATH" python gallery/publish.py $(STUDIES)

gallery-quick: install  ## a part of each study of the gallery, in minutes, and the test of the conclusions that are certain
	$(foreach study,ranks methods chat encoder,PATH="$(CURDIR)/$(BIN):$$PATH" sh gallery/$(study)/run.sh study=gallery_quick_$(study) $(quick_$(study)) &&) true
	PATH="$(CURDIR)/$(BIN):$$PATH" sh gallery/import/run.sh gallery_quick_import
	PATH="$(CURDIR)/$(BIN):$$PATH" peftsweep-collect --no-plots $(STUDIES:%=multirun/gallery_quick_%)
	GALLERY=multirun/gallery_quick_ $(BIN)/python -m pytest -q tests/test_gallery.py -k conclusion

reference: install  ## docs/reference and llms.txt, from the source
	$(BIN)/python -m peftsweep.reference_pages docs

docs: install  ## the documentation site, in site/
	$(BIN)/zensical build --strict --clean

kernels: install  ## the numeric tests with the kernels of other CPUs, one thread and two; writes docs/tested_on.md
	$(BIN)/python tests/tested_on.py

$(RAY)/installed: pyproject.toml constraints.txt  # its launcher wants older versions of these than all the others
	$(PYTHON) -m venv $(RAY)
	grep -vE '^(cloudpickle|joblib|python-dateutil)==' constraints.txt > $(RAY)/constraints.txt
	$(RAY)/bin/pip install --quiet -c $(RAY)/constraints.txt -e '.[dev,ray]'
	touch $@

$(OPTUNA_2)/installed: pyproject.toml constraints.txt  # Hydra's own sweeper wants Optuna 2 and SQLAlchemy 1
	$(PYTHON) -m venv $(OPTUNA_2)
	grep -viE '^(alembic|optuna|sqlalchemy)==' constraints.txt > $(OPTUNA_2)/constraints.txt
	$(OPTUNA_2)/bin/pip install --quiet -c $(OPTUNA_2)/constraints.txt -e '.[optuna_hydra]' pytest
	touch $@

slow: install $(RAY)/installed $(OPTUNA_2)/installed  ## the dearer tier; PEFTSWEEP_DATA names a folder of real rows, PEFTSWEEP_ENCODER a pretrained encoder
	$(BIN)/python -m pytest -m slow -v -s --no-header --disable-warnings | tee tests/slow.log
	$(RAY)/bin/python -m pytest -m slow -v -s --no-header --disable-warnings -k ray tests/sweep/test_engine.py | tee -a tests/slow.log
	$(OPTUNA_2)/bin/python -m pytest -m slow -v -s --no-header --disable-warnings tests/sweep/test_optuna_hydra.py | tee -a tests/slow.log
	for name in $(BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --out benchmarks/results/$$name.json || exit 1; \
	done
