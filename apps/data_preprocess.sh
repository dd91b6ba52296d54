#!/usr/bin/env bash
# jsonl to an indexed dataset: edit the paths, or a copy of this file. They are relative to the folder it is run in.
#
#   --path      jsonl files; `python convert_json2index.py --help` says what else is read
#   --language  zh, en or code
#   --output    folder of the dataset, not the one that holds the jsonl file
python convert_json2index.py \
    --path ../../data_test/converted_data/alpaca/alpaca_zh.jsonl \
    --language zh \
    --output ../../data_test/indexed_data/data_ralpaca_zh
