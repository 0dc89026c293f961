#!/bin/sh
# Trains the built-in model from nothing: train.sh TEXTS WORK. See README.md beside this file.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: $0 TEXTS WORK" >&2
    exit 2
fi
here=$(dirname "$0")
python=${PYTHON:-python3}
"$python" "$here/tokenizer.py" --texts "$1" --work "$2"
"$python" "$here/train.py" --work "$2" --tokens "${TOKENS:-30e6}" --shape "${SHAPE:-nano}" --threads "${THREADS:-2}"
"$python" "$here/export.py" --work "$2" --out "$2/model"
"$python" "$here/needles.py" --model "$2/model" --threads "${THREADS:-2}"
