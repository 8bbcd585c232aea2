# Two commands do it all on a fresh machine: `make demo` and `make test`. Each makes its own .venv first.
PYTHON ?= python3
# PyTorch goes in before what depends on it, so that pip does not choose another build of it. Set TORCH= to keep pip's choice.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo demo-all test test-all docs docs-serve test-matrix test-mixins test-wheel lint format cards notebooks dense \
	bench bench-any-budget bench-budgets bench-clip bench-selection clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),"$(TORCH)")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/prune_digit_vqa.py --output_dir outputs/demo

# BLIP's four tasks and CLIP, one table.
demo-all: install
	$(BIN)/python examples/demo_all.py --output_dir outputs/demo-all

# A process for each core; the tests of a file share what they set up.
test: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Those marked slow as well.
test-all: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "slow or not slow"

# The documentation's site, into outputs/site; warnings are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir outputs/site

docs-serve: install
	$(BIN)/mkdocs serve

# The frozen checkpoints under the oldest, a middle and the newest transformers, each in an environment of its own. Downloads them.
test-matrix:
	$(PYTHON) tests/helpers/version_matrix.py --torch "$(TORCH)"

# transformers' own model tests, from the source distribution of the installed version: downloaded once, into
# ~/.cache/madtp_hf. With MADTP_HF_STOCK=1 on transformers' BLIP as well, the yardstick.
test-mixins: install
	$(BIN)/python tests/helpers/transformers_tests.py
	$(BIN)/python -m pytest -m "" tests/test_transformers_mixins.py

# README's quick start, from a wheel in a clean environment.
test-wheel:
	$(PYTHON) tests/helpers/wheel_check.py --torch "$(TORCH)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the cards of the shipped checkpoints, examples/*-digits/README.md, from model_cards/ and the results.
cards: install
	$(BIN)/python model_cards/generate.py

# Runs the notebooks and keeps what they print and draw.
notebooks: install
	$(BIN)/python -m tests.helpers.notebooks

# Trains the shipped dense checkpoints anew: the first, then those that start from it.
dense: install
	$(BIN)/python examples/train_dense_blip.py --output_dir examples/blip-vqa-digits
	$(BIN)/python examples/train_dense_blip.py --plain --batch_size 32 --caption_steps 1000 --question_steps 2400 --output_dir examples/blip-vqa-digits-plain
	$(BIN)/python examples/train_dense_tasks.py nlvr2 --output_dir examples/blip-nlvr2-digits --steps 4500 --batch_size 24
	$(BIN)/python examples/train_dense_tasks.py captioning --output_dir examples/blip-captioning-digits --steps 2500
	$(BIN)/python examples/train_dense_tasks.py retrieval --output_dir examples/blip-retrieval-digits --steps 1200 --batch_size 64
	$(BIN)/python examples/train_dense_clip.py --output_dir examples/clip-digits --steps 600 --threads 1

# Against transformers' BLIP, ToMe and EViT at BLIP-base size; some hours on 2 cores. What is committed took less, see docs/performance.md.
bench: install
	$(BIN)/python benchmarks/speed.py --training_step --output benchmarks/results/speed_cpu.json
	$(BIN)/python benchmarks/profile_pass.py --output benchmarks/results/profile_cpu.json
	$(BIN)/python benchmarks/launches.py --kernels --output benchmarks/results/launches.json
	$(BIN)/python benchmarks/plot.py benchmarks/results/speed_cpu.json

# Any budget on random models of all tasks and many sizes: some minutes.
bench-any-budget: install
	$(BIN)/python benchmarks/any_budget.py --output benchmarks/results/any_budget.json

# One checkpoint for every budget against one checkpoint a budget, on digit scenes.
bench-budgets: install
	$(BIN)/python benchmarks/budgets.py --tasks vqa --output benchmarks/results/budgets_digits.json --options --learning_rate 3e-5

# What pruning costs CLIP on digit scenes, with Token Merging beside it.
bench-clip: install
	$(BIN)/python benchmarks/clip_digits.py --output benchmarks/results/clip_digits.json

# MADTP beside other ways to choose tokens at equal budgets, without training and after fine-tuning; hours. Goes on where it was.
bench-selection: install
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/selection_finetuned.py
	$(BIN)/python benchmarks/selection.py --table docs

clean:
	rm -rf .venv outputs
