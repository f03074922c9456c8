#!/bin/sh
# What rank does a 135M model need, and what do 4 bits cost it? sweep/ranks.yaml is the study.
set -eu
peftsweep --config-dir "$(dirname "$0")" sweep=ranks study=gallery_ranks model="${MODELS:-HuggingFaceTB}/SmolLM2-135M-Instruct" \
    ${DATA:+dataset.path="$DATA/commonsense/commonsense_17k.jsonl"} ${DATA:+dataset.test_path="$DATA/commonsense/arc_easy_test.jsonl"} \
    ${DATA:+eval.arc_easy.path="$DATA/commonsense/arc_easy_test.jsonl"} "$@" -m
