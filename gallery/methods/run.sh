#!/bin/sh
# Which method, at which rate? Seven methods at their usual rate, at three and at ten times it; the best third goes on.
set -eu
peftsweep --config-dir gallery/ranks study=gallery_methods model="${MODELS:-HuggingFaceTB}/SmolLM2-135M-Instruct" \
    dataset=openbookqa dataset.reader=cloze.question dataset.missing=drop eval.openbookqa.reader=cloze.question \
    ${DATA:+dataset.path="$DATA/commonsense/commonsense_17k.jsonl"} ${DATA:+dataset.test_path="$DATA/commonsense/openbookqa_test.jsonl"} \
    ${DATA:+eval.openbookqa.path="$DATA/commonsense/openbookqa_test.jsonl"} 'eval=[openbookqa,perplexity]' \
    eval.openbookqa.samples=100 eval.perplexity.samples=100 dataset.validation_samples=32 halving.min_steps=10 \
    method=lora,dora,rslora,pissa,ia3,vera,full train.learning_rate_scale=1,3,10 train.steps=30 train.batch_size=8 "$@" -m
