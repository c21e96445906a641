#!/usr/bin/env bash
# Builds the libraries of this folder: a plugin for each released layout of the plugin API's tables, and files that a
# host must refuse. x86-64 Linux. The same inputs give the same bytes.
#
#   make.sh                 all
#   make.sh 0_1_b           one
#   make.sh 0_1_c HEAD      one, against another revision than the one listed
#
# A release appends: copy plugin/today.rs to plugin/released_0_1_c.rs, name it in plugin/Cargo.toml and in `released` below with
# the revision that has the layout, and build it alone. Files that are there are evidence of what was released: never
# build one anew because the sources of the toy changed.
set -euo pipefail

# Layout and the revision that released it, oldest first.
released=(
  "0_1_a 04aaa8d"
  "0_1_b 6ac0d82"
  "0_1_c a281a87"
)
toolchain=1.95.0

here=$(cd "$(dirname "$0")" && pwd)
top=$(git -C "$here" rev-parse --show-toplevel)
work=${TMPDIR:-/tmp}/torus-abi-data
home=${CARGO_HOME:-$HOME/.cargo}

# unpack REVISION: the plugin project with Torus as of that revision beside it, built with that revision's lock file.
unpack() {
  # Nothing built is kept: cargo goes by time stamps, and those of an archive are the commit's.
  rm -rf "$work"
  mkdir -p "$work/torus"
  git -C "$top" archive "$1" | tar -x -C "$work/torus"
  cp "$here"/plugin/* "$work/torus/Cargo.lock" "$work/"
}

# build EXAMPLE DESTINATION
build() {
  (
    cd "$work"
    unset CARGO_INCREMENTAL
    export RUSTFLAGS="--remap-path-prefix=$work=. --remap-path-prefix=$home=cargo -C link-arg=-Wl,--build-id=none"
    CARGO_TARGET_DIR=$work/target cargo "+$toolchain" build --quiet --release --example "$1"
  )
  cp "$work/target/release/examples/lib$1.so" "$2"
  chmod 644 "$2"
}

layout() {
  unpack "$2"
  build "released_$1" "$here/released_$1.so"
}

panic_abort() {
  unpack "$1"
  CARGO_PROFILE_RELEASE_PANIC=abort build panic_abort "$here/panic_abort.so"
}

wrong_root() {
  unpack "$1"
  build wrong_root "$here/wrong_root.so"
}

# Libraries of C: small enough without a runtime.
of_c() {
  printf '%s\n' "$2" | cc -shared -nostdlib -s -Os -Wl,--build-id=none,-z,noseparate-code -x c -o "$here/$1.so" -
  chmod 644 "$here/$1.so"
}

root=_1as_0lib_1header_0root_bmodule_bloader

# Its constructor would end the process.
no_root() { of_c no_root '__attribute__((constructor)) static void run(void) { __builtin_trap(); }'; }

garbage_root() { of_c garbage_root "char $root[1024] = \"no header\";"; }

# A symbol of four bytes at the end of a page, after which nothing is mapped.
short_root() {
  local place=".data; .balign 4096; .fill 4092; .globl $root; .type $root, @object; .size $root, 4; $root: .long 7"
  of_c short_root "__asm__(\"$place\");"
}

root_function() { of_c root_function "int $root(void) { return 42; }"; }

# The linker that comes with Rust makes a shared object of any machine, here around a line of text.
other_architecture() {
  mkdir -p "$work"
  local lld
  lld=$(rustc "+$toolchain" --print sysroot)/lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-lld
  # From within the folder: the linker makes symbols of the path it is given.
  (cd "$work" && echo "a library for another machine" >note &&
    "$lld" -flavor gnu -shared -m aarch64linux --format=binary note -o "$here/aarch64.so")
  chmod 644 "$here/aarch64.so"
}

newest=${released[-1]#* }
if [ $# = 2 ]; then
  layout "$1" "$2"
  exit
fi
for line in "${released[@]}"; do
  if [ "${1:-${line% *}}" = "${line% *}" ]; then layout "${line% *}" "${line#* }"; fi
done
for file in panic_abort wrong_root no_root garbage_root short_root root_function other_architecture; do
  if [ "${1:-$file}" = "$file" ]; then "$file" "$newest"; fi
done
