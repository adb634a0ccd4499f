#!/usr/bin/env bash
# Passes all tests on a fresh Debian or Ubuntu machine that has Rust and a C compiler.
# Where no Vulkan adapter answers it installs Mesa's software one (lavapipe), so that every kernel test runs on some
# adapter: with REQUIRE_GPU=1 a missing adapter fails the tests instead of skipping them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

cargo test --no-run

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "test.sh: cannot run '$*' without root or sudo: install libvulkan1 and mesa-vulkan-drivers, then try again" >&2
        exit 1
    fi
}

# Asks our own program, which sees what the tests will see: a driver's file alone is no adapter.
devices=$(cargo run --quiet -- devices)
if ! grep -Eq 'Vulkan|Metal|Dx12' <<<"$devices"; then
    if ! command -v apt-get >/dev/null; then
        echo "test.sh: no GPU adapter answers, and there is no apt-get to install Mesa's software Vulkan with" >&2
        exit 1
    fi
    echo "test.sh: no GPU adapter answers: installing software Vulkan (mesa-vulkan-drivers)"
    as_root apt-get update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends libvulkan1 mesa-vulkan-drivers
fi

REQUIRE_GPU=1 cargo test
