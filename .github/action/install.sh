#!/usr/bin/env bash
# Installs `fault` for the steps that follow: the release's binary, or one built from this checkout
# where the ref that the workflow names has no release.
#
#   ACTION_REF       the ref behind `@` in the workflow: a tag, a branch or a commit
#   FAULT_RELEASES   the URL of the releases; the tests have a server of their own
set -euo pipefail

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$RUNNER_TEMP/fault
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$source/Cargo.toml" | head -n 1)
release=${FAULT_RELEASES:-https://github.com/fault-injector/fault/releases/download}/v$version
binary=fault-linux-$(uname -m)

fail() {
    echo "::error::fault: $*"
    exit 1
}

# Downloads a file of the release. Fails when the release has none; ends the step after any other error.
fetch() {
    local status
    status=$(curl --silent --show-error --location --retry 3 --retry-connrefused \
        --output "$folder/$1" --write-out '%{http_code}' "$release/$1") ||
        fail "can't download $release/$1"
    case $status in
        200) ;;
        404) return 1 ;;
        *) fail "can't download $release/$1: HTTP $status" ;;
    esac
}

# Whether the ref is the release's tag, a tag of a major version (which moves with the releases), or
# the release's commit.
is_released() {
    local ref=${ACTION_REF:-}
    if [[ $ref == "v$version" || $ref =~ ^v[0-9]+$ ]]; then
        fetch SHA256SUMS
    elif [[ $ref =~ ^[0-9a-f]{40}$ ]]; then
        fetch COMMIT && [ "$(cat "$folder/COMMIT")" = "$ref" ] && fetch SHA256SUMS
    else
        return 1
    fi
}

download() {
    fetch "$binary" || fail "$release has no $binary"
    (cd "$folder" && grep " $binary\$" SHA256SUMS | sha256sum --check --strict) ||
        fail "$release/$binary does not have the checksum in SHA256SUMS"
    mv "$folder/$binary" "$folder/fault"
}

build() {
    echo "There is no release for '${ACTION_REF:-}': building fault from source takes some minutes"
    (cd "$source" && cargo build --release --locked --package fault-user)
    cp "$source/target/release/fault" "$folder/fault"
}

mkdir -p "$folder"
if is_released; then download; else build; fi
chmod 755 "$folder/fault"
echo "$folder" >> "$GITHUB_PATH"
"$folder/fault" --version
