#!/bin/sh
# Runs `vidaccel bench gpu` from a checkout on a machine that has torch and Triton, perhaps without
# a network, and keeps what that machine has.
#
#   sh examples/gpu_machine.sh wheels 3.12      where there is a network: the wheels into .wheels,
#                                               for the Python of the other machine
#   sh examples/gpu_machine.sh bench [options]  there, in a copy of the checkout with .wheels in it
#
# SITE is where packages are laid (default: /tmp/vidaccel-site), PYTHON the interpreter that has torch.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/vidaccel-site}
# What the bench imports beside torch and Triton, with what it needs in turn. accelerate comes without:
# it would bring another torch.
PACKAGES="diffusers ftfy imageio networkx platformdirs pydantic safetensors tqdm transformers"

case "${1:-}" in
wheels)
    version=${2:?"the Python of the other machine is missing, such as 3.12"}
    mkdir -p .wheels
    # pip takes a platform literally, so the older ones are named too.
    platforms=$(for n in 28 27 24 17; do printf -- '--platform manylinux_2_%s_x86_64 ' "$n"; done)
    fetch() {
        # shellcheck disable=SC2086
        $PYTHON -m pip download --quiet --disable-pip-version-check --dest .wheels \
            --only-binary=:all: --implementation cp --python-version "$version" \
            $platforms --platform manylinux2014_x86_64 "$@"
    }
    # shellcheck disable=SC2086
    fetch $PACKAGES
    fetch --no-deps accelerate
    du -sh .wheels
    ;;
bench)
    shift
    # A package that is there already stays: it was built with the rest of that machine.
    missing=$($PYTHON - .wheels/*.whl <<'END'
import importlib.metadata as known
import os
import sys

for wheel in filter(os.path.exists, sys.argv[1:]):
    try:
        known.version(os.path.basename(wheel).split("-")[0])
    except known.PackageNotFoundError:
        print(wheel)
END
    )
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086
        $PYTHON -m pip install --quiet --no-index --no-deps --no-compile \
            --disable-pip-version-check --upgrade --target "$SITE" $missing
    fi
    PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" exec $PYTHON -m vidaccel bench gpu "$@"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
