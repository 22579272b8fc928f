# Two commands: `make demo` runs the demonstration, `make test` runs the tests; each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The release that the environment is pinned to; any from 2.11 on will do: `make test TORCH=torch`.
TORCH ?= torch==2.13.0
# The Triton releases for which the kernels are compiled ahead of time: all that are served.
RELEASES := 3.6.0 3.7.1 3.8.0 3.9.0
TRITON_DIRS := $(RELEASES:%=.cache/triton-%)
WORKERS ?= auto

empty :=
space := $(empty) $(empty)

# pytest must be told where the tests are: it takes the value of an option that it does not know yet for a path.
TESTS ?= tests

.PHONY: demo test gpu-test sanitize compiled-for-sanitizers results report lint clean FORCE

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[demo,test,lint]"
	touch $@

.cache/triton-%/.installed: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed $(TRITON_DIRS:%=%/.installed)
	TCONV_TRITON_DIRS=$(subst $(space),:,$(TRITON_DIRS:%=$(CURDIR)/%)) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not alone"

# On a machine with a GPU and torch already installed: the same tests on the real kernels, and every layer of the
# suites at full size, but not compilation for other targets, which needs no GPU; then what is timed, by itself (exit
# status 5: TESTS names none of it).  The summaries are kept under benchmarks/results/.
gpu-test:
	$(PYTHON) -m pytest --ignore tests/test_aot.py -n $(WORKERS) --dist worksteal -m "not alone" --summary benchmarks/results/gpu-test.json $(TESTS)
	$(PYTHON) -m pytest -m alone --summary benchmarks/results/gpu-test-alone.json $(TESTS) || [ $$? -eq 5 ]

# On a machine with a Hopper GPU: compute-sanitizer over the forms of the kernels for it; the logs are kept.  Triton asks the driver
# for more shared memory than a watched kernel may have, and does with less: no error of the kernel's.
# The kernels are compiled before any tool watches, so that the three may run side by side (make -j3 sanitize).
sanitize: $(patsubst %,benchmarks/results/sanitizer-%.txt,memcheck racecheck initcheck)
compiled-for-sanitizers:
	seq 0 11 | xargs -P 12 -I{} $(PYTHON) tests/sanitized.py {} 12
benchmarks/results/sanitizer-%.txt: compiled-for-sanitizers FORCE
	compute-sanitizer --tool $* --show-backtrace no $(if $(filter memcheck,$*),--report-api-errors no) --kernel-regex kns=tconv --error-exitcode 1 $(PYTHON) tests/sanitized.py > $@ 2>&1

# The published results, made on a machine with GPUs and torch already installed: `make results GPUS=4`, by estimate half
# an hour on four H200s.  One that was stopped goes on with RESUME=--resume.
RESULTS := $(patsubst %,benchmarks/results/%.json,$(foreach pass,forward gradients,$(addprefix $(pass)-,tf32-bf16 fp16 fp32)))
GPUS ?= 1
# In IEEE fp32 cuDNN is slow in channels_last, and its search there takes longer than all the rest: of 630 cases the way by conversions
# was the fastest in 11, by at most a quarter.
BENCH = $(PYTHON) -m tconv.bench --plain --quick --gpus $(GPUS) $(RESUME) \
	--provider tconv cudnn cudnn-default $(if $(filter fp32,$*),,cudnn-nhwc-convert) \
	--suite kernelbench zoo --format contiguous channels_last --precision $(subst -, ,$*) --output $@
results: $(RESULTS)
benchmarks/results/forward-%.json: FORCE
	$(BENCH) --pass forward
benchmarks/results/gradients-%.json: FORCE
	$(BENCH) --pass backward_input backward_weight training
FORCE:

# The published tables and charts, from those of the results above that there are, and others; a case that several hold comes from the
# first.  And the drawing of the shift kernel, from its code.
OTHERS := $(patsubst %,benchmarks/results/%,forward-fp32-a632b72.json.partial \
	$(addsuffix .json,forward-fp16-fp32 forward-fp16-fp32-1d3d4d2 gradients-fp16-fp32 gradients-tf32-bf16-8c30bf7 gradients-tf32-bf16-8cc5921))
PUBLISHED := $(patsubst %,benchmarks/results/%,forward-few-4669f91.json gradients-fp32-4669f91.json.partial forward-tf32-bf16-c504543.json) $(wildcard $(RESULTS)) $(OTHERS)
report: $(VENV)/.installed
	$(BIN)/python -m tconv.bench report $(PUBLISHED) --summary --into README.md
	$(BIN)/python -m tconv.bench report $(PUBLISHED) --plots docs/figures --into docs/benchmarks.md
	$(BIN)/python docs/figures/shift.py

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache out
