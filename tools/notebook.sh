#!/usr/bin/env bash
# Runs a tutorial as a notebook: tools/notebook.sh tutorials/01_….py
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/jupytext --to ipynb --set-kernel python3 --output "$folder/tutorial.ipynb" "$1"
.venv/bin/jupyter-execute "$folder/tutorial.ipynb"
