#!/bin/sh
# What does a classifier need? All weights, LoRA, or LoRA on 4 bits: a small encoder on SST-2, each at a rate of its own.
set -eu
peftsweep sweep=distilbert_sst2 study=gallery_encoder model=encoder model.name_or_path="${MODELS:-sentence-transformers}/all-MiniLM-L6-v2" \
    ${DATA:+dataset.path="$DATA/sst2/train.tsv"} ${DATA:+dataset.test_path="$DATA/sst2/validation.tsv"} \
    dataset.samples=2000 train.epochs=null train.steps=80 train.batch_size=16 "$@" -m
