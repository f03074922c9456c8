#!/bin/sh
# Which method, at which rate? sweep/methods_at_rates.yaml beside the study of ranks, whose rows it takes, is the study.
set -eu
peftsweep --config-dir gallery/ranks sweep=methods_at_rates study=gallery_methods model="${MODELS:-HuggingFaceTB}/SmolLM2-135M-Instruct" \
    ${DATA:+dataset.path="$DATA/commonsense/commonsense_17k.jsonl"} ${DATA:+dataset.test_path="$DATA/commonsense/arc_easy_test.jsonl"} \
    ${DATA:+eval.arc_easy.path="$DATA/commonsense/arc_easy_test.jsonl"} "$@" -m
