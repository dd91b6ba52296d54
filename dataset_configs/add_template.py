"""The chat template of the 9G guide, as a transform: name it under "transforms" of a dataset."""

import random


def transform(data: dict, num_sample: int, r: random.Random) -> dict:
    if "input" not in data:
        return {"input": "", "output": data.get("output", "")}
    return {
        "input": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>User\n{data['input']}<|im_end|>\n<|im_start|>assistant\n",
        "output": f"{data['output']}<|im_end|>",
    }
