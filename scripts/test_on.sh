#!/usr/bin/env bash
# The tests on another supported torch, on its CUDA build, in an environment of its own: made once (5 GB), then reused.
# What is expected to fail there stands in tests/versions.py; anything else that fails or is skipped is an error.
set -euo pipefail

refuse() {
    echo "test_on.sh: $1; usage: scripts/test_on.sh torch=2.11|2.12|2.13 [venv=DIRECTORY] [workers=N] [only=PATH]" >&2
    exit 2
}

torch='' venv='' workers=2 only=''
for argument in "$@"; do
    case $argument in
        torch=*) torch=${argument#*=} ;;
        venv=*) venv=${argument#*=} ;;
        workers=*) workers=${argument#*=} ;;
        only=*) only=${argument#*=} ;;
        *) refuse "what is '$argument'" ;;
    esac
done
case $torch in
    2.11) transformers=5.17.0 ;; # the oldest of both
    2.12 | 2.13) transformers=5.23.0 ;;
    '') refuse "which torch" ;;
    *) refuse "torch=$torch is not supported" ;;
esac
[[ $workers =~ ^[1-9][0-9]*$ ]] || refuse "workers=$workers is not a number of processes"
cd "$(dirname "$0")/.."
[ -z "$only" ] || [ -e "$only" ] || refuse "only=$only is not there"
venv=${venv:-.venv-$torch}
python=$venv/bin/python

if [ ! -x "$python" ]; then
    [ ! -e "$venv" ] || refuse "venv=$venv is there and is no environment"
    newest=$(command -v python3.12 || command -v python3)
    echo "making $venv with $("$newest" --version)"
    "$newest" -m venv "$venv"
fi
version() { "$python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || true; }
case $(version torch) in
    "$torch".*) ;;
    '') "$venv/bin/pip" install --quiet --disable-pip-version-check "torch==$torch.*" ;;
    *) refuse "venv=$venv has torch $(version torch)" ;;
esac
if [ -z "$(version pytest-xdist)" ] || [ "$(version transformers)" != "$transformers" ]; then
    # Other packages as `make` pins them, but for those that come with torch and transformers.
    "$venv/bin/pip" install --quiet --disable-pip-version-check "torch==$torch.*" "transformers==$transformers" \
        -c <(grep -vE '^(torch|transformers|huggingface_hub|hf-xet|numpy)==' constraints.txt) -e '.[sample,dev]'
fi

for package in torch triton transformers numpy; do echo "$package $(version $package)"; done
"$python" --version
export PYTHONPATH=$PWD/src PYTEST_ADDOPTS="--known-skips"
start=$SECONDS status=0
OMP_WAIT_POLICY=passive "$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -m 'not slow' ${only:+"$only"} || status=$?
echo "$((SECONDS - start)) s"
exit $status
