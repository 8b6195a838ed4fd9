#!/bin/bash
cd /tmp/w/lead7 && PYTHONPATH=/tmp/w/lead7 /work/main/.venv/bin/python "$@"
