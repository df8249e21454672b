# Every target sets itself up first, except sanitize, gpu and clean. `make setup PYTHON=python3.12` chooses the
# interpreter of the environment.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
# The newest versions of torch and transformers that are tested, in an environment of their own, with torch's triton.
NEWEST := .venv-newest
NEWEST_VERSIONS := torch==2.13.0 triton==3.7.1 transformers==5.23.0
# The oldest versions of transformers and timm whose models are accelerated, on top of the reference environment.
OLDEST := $(VENV)/oldest
OLDEST_VERSIONS := transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.2 timm==1.0.9
# The ends of what pyproject.toml allows: the oldest and the newest Python, with the oldest and the newest torch.
TORCH_OF_3.10 := torch==2.9.1
TORCH_OF_3.13 := torch==2.13.0
ENDS := tests/model tests/weights tests/features tests/data tests/hub
# Headers for the extension (setup.py names the same version); the dependencies that pip would install are not used.
CUTLASS := nvidia-cutlass==4.2.0.0

PYTEST := -m pytest tests -n $(WORKERS)
# A process either interprets kernels or compiles them, so `test` runs pytest twice.
AOT := env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(PY) $(PYTEST)
FAST := not aot and not gpu and not slow
SLOW := slow and not aot and not gpu
INPUTS := constraints.txt pyproject.toml setup.py

# A complete environment has a file with the path of its checkout. An environment without this file (an interrupted
# installation), from another path, or without a working interpreter is set up again.
complete = $(1)/.complete
intact = $(filter ok,$(shell { [ "$$(cat $(call complete,$(1)))" = "$(CURDIR)" ] && $(1)/bin/python -c "print('ok')"; } 2>/dev/null))
install = $(1)/bin/python -m pip install --quiet --quiet --disable-pip-version-check
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else \
	    "The reference environment needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "Setting up $(1) ($(2)): downloads up to 3 GB and takes some minutes."
	@$(if $(call intact,$(1)),rm $(call complete,$(1)),$(PYTHON) -m venv --clear $(1))
endef

.PHONY: setup demo check test test-fast test-aot test-slow test-newest test-oldest build test-extension test-cuda-on-host \
    sanitize lint types bench report gpu gpu-tiny clean broken

setup: $(call complete,$(VENV))
	@:

$(call complete,$(VENV)): $(INPUTS) $(if $(call intact,$(VENV)),,broken)
	$(call make_venv,$(VENV),the reference environment)
	@$(call install,$(VENV)) --constraint constraints.txt pip setuptools wheel
	@$(call install,$(VENV)) --constraint constraints.txt --no-build-isolation --editable '.[test,peers,dev]'
	@printf '%s' '$(CURDIR)' > $@

$(call complete,$(NEWEST)): $(INPUTS) Makefile $(if $(call intact,$(NEWEST)),,broken)
	$(call make_venv,$(NEWEST),$(NEWEST_VERSIONS))
	@sed -E '/^(torch|triton|torchvision|timm|xformers|transformers|tokenizers)==/d' constraints.txt > $(NEWEST)/constraints.txt
	@$(call install,$(NEWEST)) --constraint $(NEWEST)/constraints.txt pip setuptools wheel
	@$(call install,$(NEWEST)) --constraint $(NEWEST)/constraints.txt --no-build-isolation $(NEWEST_VERSIONS) --editable '.[test]'
	@printf '%s' '$(CURDIR)' > $@

$(OLDEST)/.complete: $(call complete,$(VENV)) Makefile
	@rm -rf $(OLDEST)
	@$(call install,$(VENV)) --no-deps --target $(OLDEST) $(OLDEST_VERSIONS)
	@touch $@

demo: setup
	@$(PY) examples/demo.py

# What to run before each commit: some 8 minutes on 2 idle cores.
check: lint types test-fast

test-fast: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) $(PYTEST) -m "$(FAST)"

test: test-fast
	$(AOT) -m "aot and not slow"

# Every configuration of every kernel for every architecture; run it when kernels change. The first run takes up to half
# an hour; Triton's cache, by content, makes the next ones shorter.
test-aot: setup
	TRITON_CACHE_DIR=$(CURDIR)/$(VENV)/triton-cache $(AOT) -m "aot and slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) -m "$(SLOW)"
	DINOV2_FAST_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) $(PYTEST) -m "golden and $(FAST)"

test-newest: $(call complete,$(NEWEST))
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) -m "$(FAST)"

# By hand, where python3.10 or python3.13 is installed: `make test-python-3.10`. The environment takes up to 8 GB.
.PRECIOUS: .venv-python-%/.complete
.venv-python-%/.complete: $(INPUTS)
	python$* -m venv --clear .venv-python-$*
	@$(call install,.venv-python-$*) $(TORCH_OF_$*) --editable '.[test]'
	@touch $@

test-python-%: .venv-python-%/.complete
	OMP_NUM_THREADS=1 .venv-python-$*/bin/python -m pytest -n $(WORKERS) -m "$(FAST)" $(ENDS)

test-oldest: $(OLDEST)/.complete
	PYTHONPATH=$(OLDEST) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m "$(FAST)" tests/integrations

# The CUDA extension, dinov2_fast/_cuda.abi3.so, with the nvcc that setup.py finds. A source is compiled again if it, a
# header or a flag has changed, MAX_JOBS at once.
build: setup
	@$(PY) -m pip show --quiet nvidia-cutlass 2>/dev/null || $(call install,$(VENV)) --no-deps $(CUTLASS)
	$(PY) setup.py --quiet build_ext --inplace --build-temp build/extension
	@$(PY) -c 'import sys; from dinov2_fast import extension as e; print(e.availability()); sys.exit(e.load().reason is not None)'

# Checks that the extension loads without a GPU, the compiler's reports on its kernels, and their machine code.
test-extension: build
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(PY) -m pytest tests/ops/test_extension.py

# The tests of linear and attention on the kernels of csrc, which g++ compiles for the CPU: needs neither nvcc nor a
# GPU. The gradient of attention is Triton's.
test-cuda-on-host: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -p tests.cuda_on_host -m "not aot and not gpu" \
	    tests/ops/test_linear_cuda.py tests/ops/test_attention_cuda.py

# compute-sanitizer on the tests marked `sanitize`, on a machine with a GPU. No setup: it uses $(PYTHON)'s torch and
# pytest, and the extension, which must be built. The allocator caches nothing, so that reads beyond a tensor's end show. Only
# memcheck: racecheck, synccheck and initcheck report false faults in CUTLASS' pipelines.
define sanitize
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 20 \
	    --target-processes application-only $(PYTHON) -m pytest -q -p no:cacheprovider -m "$(1)" $(2)
endef
sanitize:
	@$(PYTHON) -c 'import sys, torch; from dinov2_fast import extension as e; gpu = torch.cuda.is_available(); \
	    sys.exit(e.load().reason if gpu else "make sanitize needs a GPU that $(PYTHON) can use")'
	$(call sanitize,sanitize,tests/ops/test_linear_cuda.py tests/ops/test_attention_cuda.py)
	$(call sanitize,sanitize and triton,tests/ops)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/* tests/cuda_on_host/*.h tests/cuda_on_host/*.cu

types: setup
	$(PY) -m mypy

# On the CPU, some 40 minutes on 2 idle cores; other load distorts the figures. OpenVINO is measured where it is
# installed: `pip install openvino`. REFERENCE names a checkout of facebookresearch/dinov2.
BENCH := $(PY) -m bench
CPU := --device cpu --write
CPU_MODES := eager,freezing,engine,accelerated-transformers,accelerated-timm
bench: setup
	$(BENCH).model $(CPU) --task throughput --sizes 224 --modes $(CPU_MODES)
	$(BENCH).model $(CPU) --task throughput --sizes 518 --models S,B --outputs all
	$(BENCH).model $(CPU) --task latency --outputs cls --seconds 10 --modes $(CPU_MODES)
	$(BENCH).model $(CPU) --task host --seconds 5
	$(BENCH).model $(CPU) --task training
	$(BENCH).model $(CPU) --task memory
	$(BENCH).pretraining $(CPU) $(if $(REFERENCE),--reference-path '$(REFERENCE)')
	OMP_WAIT_POLICY=PASSIVE $(BENCH).extraction $(CPU)  # as the command has it
	$(BENCH).ops $(CPU) --models S --sizes 224
	$(BENCH).report

# README's tables and plots, from bench/results.
report: setup
	$(BENCH).report

# No setup: runs on the torch of $(PYTHON), on a machine with a GPU; `$(PYTHON) -m bench.gpu --help` says more.
# TINY=1 runs the same steps on a CPU with tiny models. TASK=pretraining runs other steps.
gpu:
	@$(PYTHON) -m bench.gpu $(if $(RESULTS),--results '$(RESULTS)') $(if $(COMMIT),--commit '$(COMMIT)') \
	    $(if $(BUDGET),--budget '$(BUDGET)') $(if $(EXTENSION),--extension '$(EXTENSION)') \
	    $(if $(TASK),--task '$(TASK)') $(if $(REFERENCE),--reference-path '$(REFERENCE)') \
	    $(if $(TINY),--tiny) $(if $(DRY_RUN),--dry-run)

# What CI runs of it, in the reference environment and without earlier results. The budget is enough for a slow CPU.
gpu-tiny: setup
	rm -rf build/gpu-tiny
	$(PY) -m bench.gpu --tiny --commit tiny --budget 30

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output
	find . -name .venv\* -prune -o -name __pycache__ -type d -exec rm -rf {} +
