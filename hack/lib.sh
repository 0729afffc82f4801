# Shared by the scripts in this directory: where things are. To be sourced.
# shellcheck shell=bash

set -euo pipefail

# The source tree.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Everything that is fetched or built is here, outside the source tree.
cache=${GODWIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/godwit}
export GODWIT_CACHE=$cache
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

need_root() {
    [[ $(id -u) == 0 ]] || die "needs root"
}

# Builds what the nodes of a demonstration or a benchmark run, and the chores themselves.
build_release() {
    say "building in release mode (into $CARGO_TARGET_DIR)"
    cargo build --release --quiet --manifest-path "$top/Cargo.toml" \
        -p godwit -p containerd-shim-godwit -p xtask -p godwit-integration --bins
    export GODWIT_BIN=$CARGO_TARGET_DIR/release
}

# Runs a chore of xtask. A signal ends it and all it has started, and what it had brought up is removed.
run_chore() {
    local chore status=0
    # In a process group of its own, without the ignored signals of a job in the background.
    set -m
    "$CARGO_TARGET_DIR/release/xtask" "$@" </dev/null &
    chore=$!
    set +m
    trap 'kill -TERM -- "-$chore" 2>/dev/null || true' INT TERM HUP
    while kill -0 "$chore" 2>/dev/null; do
        status=0
        wait "$chore" || status=$?
    done
    if ((status > 128)); then
        "$CARGO_TARGET_DIR/release/testbed" sweep >&2
        "$top/hack/guests" sweep >&2
    fi
    return "$status"
}
