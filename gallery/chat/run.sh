#!/bin/sh
# Is a chat model better trained on every turn of the assistant, or on the last? Conversations of several turns with tool calls.
set -eu
here=$(dirname "$0")
python3 "$here/conversations.py" gallery/chat/rows
peftsweep --config-dir "$here" study=gallery_chat model="${MODELS:-HuggingFaceTB}/SmolLM2-135M-Instruct" dataset=chat \
    dataset.path=gallery/chat/rows/train.jsonl 'eval=[calls,answers]' dataset.turns=all,last train.learning_rate=2e-4,1e-3 \
    targets=all_linear train.steps=30 train.batch_size=2 "$@" -m
