#!/bin/sh
# What do PEFT's own results say? Its comparison on MetaMathQA, read as a study. PEFT is a checkout of its repository:
# git clone --depth 1 https://github.com/huggingface/peft gallery/peft-main
set -eu
peftsweep-collect --from-peft "${PEFT:-gallery/peft-main}/method_comparison/MetaMathQA/results" "${1:-gallery_import}"
