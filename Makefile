# Torus from an empty machine: each target installs what is missing, fetches the pinned files it needs, and builds.
#
#   make build    target/release/torus
#   make serve    builds, and serves SmolLM2-135M-Instruct on 127.0.0.1:30000 (ARGS="--port 8000 …" for more options)
#   make test     all tests
#   make sanitize the CPU kernels' tests under the address sanitizer
#   make lint     formatting and clippy
#   make bench    a short bench of the small model against the memory bandwidth of this machine
#   make setup    only what the tests need besides Rust
#   make examples the plugins in examples/, each a workspace of its own, into target/plugins
#   make clean    removes what was built, and keeps what was fetched

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin

cache := $(or $(TORUS_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/torus)
model := $(cache)/models/SmolLM2-135M-Instruct.Q4_1.gguf
torus := target/release/torus

.DEFAULT_GOAL := help
.PHONY: help setup build examples serve test sanitize lint bench clean

help:
	@sed -n 's/^#   \(make\)/  \1/p' Makefile

setup:
	.make/setup.sh test

build:
	.make/setup.sh build
	cargo build --release --locked --workspace --bins

serve: build
	$(torus) serve --model-path $(model) --served-model-name SmolLM2-135M-Instruct $(ARGS)

examples:
	for manifest in examples/*/Cargo.toml; do \
	  cargo build --release --locked --target-dir target/plugins --manifest-path $$manifest || exit 1; \
	done

test: setup examples
	cargo build --release --locked --workspace --bins --examples
	for manifest in examples/*/Cargo.toml; do \
	  cargo test --release --locked --target-dir target/plugins --manifest-path $$manifest || exit 1; \
	done
	cargo test --release --locked --workspace
	binary=$$(cargo test --release --locked --workspace --no-run 2>&1 | sed -n 's/.* (\(.*torus_cpu-.*\))/\1/p'); \
	test -x "$$binary" || exit 1; \
	for level in portable avx2 avx512 avx512bf16; do TORUS_CPU_LEVEL=$$level $$binary || exit 1; done

# Rust's sanitizers are not stable yet; the compiler has them all the same.
sanitize:
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address \
	  cargo test --locked --package torus-cpu --target-dir target/sanitize --target $$(rustc -vV | sed -n 's/host: //p') --lib

lint:
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- --deny warnings

bench: build
	$(torus) bench one-batch --batch-size 1 4 16 --input-len 128 --output-len 64 $(ARGS) -- --model-path $(model)

clean:
	cargo clean
