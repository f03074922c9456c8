#!/bin/sh
# What rank does a 135M model need, and what do 4 bits cost it? Common-sense questions, judged by the likelihood of their choices.
set -eu
peftsweep --config-dir "$(dirname "$0")" study=gallery_ranks model="${MODELS:-HuggingFaceTB}/SmolLM2-135M-Instruct" \
    dataset=openbookqa dataset.reader=cloze.question dataset.missing=drop eval.openbookqa.reader=cloze.question \
    ${DATA:+dataset.path="$DATA/commonsense/commonsense_17k.jsonl"} ${DATA:+dataset.test_path="$DATA/commonsense/openbookqa_test.jsonl"} \
    ${DATA:+eval.openbookqa.path="$DATA/commonsense/openbookqa_test.jsonl"} 'eval=[openbookqa,perplexity]' \
    eval.openbookqa.samples=300 eval.perplexity.samples=300 seed=0,1 method.r=2,8,32 quant=none,4bit targets=all_linear \
    train.learning_rate=1e-3 train.steps=60 train.batch_size=8 "$@" -m
