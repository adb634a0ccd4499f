#!/usr/bin/env bash
# Passes all tests on a fresh Debian or Ubuntu machine that has Rust and a C compiler.
# Where there is no Vulkan driver it installs Mesa's software one (lavapipe), so that every
# kernel test runs on some adapter: here a missing adapter fails the tests instead of skipping them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

has_vulkan() {
    # ldconfig is in /sbin, which a plain user's PATH may lack. The pipe is read to its end (no -q):
    # with pipefail a writer cut short would count as a failure.
    PATH="$PATH:/sbin:/usr/sbin" ldconfig -p | grep -F libvulkan.so.1 >/dev/null || return 1
    compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null || compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

if ! has_vulkan; then
    echo "test.sh: no Vulkan driver found, installing the software one (mesa-vulkan-drivers)"
    if ! command -v apt-get >/dev/null || { [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; }; then
        echo "test.sh: cannot install it: this needs apt-get, and root or sudo." >&2
        echo "test.sh: install a Vulkan loader and driver (Debian: libvulkan1 mesa-vulkan-drivers), then try again." >&2
        exit 1
    fi
    as_root apt-get update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends libvulkan1 mesa-vulkan-drivers
    if ! has_vulkan; then
        echo "test.sh: the packages are installed, but there is still no Vulkan loader and driver." >&2
        exit 1
    fi
fi

if cargo fmt --version >/dev/null 2>&1; then
    cargo fmt --all -- --check
else
    echo "test.sh: rustfmt is not installed, formatting is not checked"
fi
if cargo clippy --version >/dev/null 2>&1; then
    cargo clippy --all-targets -- -D warnings
else
    echo "test.sh: clippy is not installed, lints are not checked"
fi
cargo check --no-default-features
cargo build --examples
REQUIRE_GPU=1 cargo test
