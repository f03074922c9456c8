#!/bin/sh
# Is a chat model better trained on every turn of the assistant, or on the last? sweep/chat.yaml is the study.
set -eu
here=$(dirname "$0")
python3 "$here/conversations.py" gallery/chat/rows
peftsweep --config-dir "$here" sweep=chat study=gallery_chat model="${MODELS:-HuggingFaceTB}/SmolLM2-135M-Instruct" "$@" -m
