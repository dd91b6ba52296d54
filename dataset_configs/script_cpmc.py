"""The plain transform of the 9G guide: a record's input and output as they are. Name it under "transforms"."""

import random


def transform(data: dict, num_sample: int, r: random.Random) -> dict:
    return {"input": data.get("input", ""), "output": data.get("output", "")}
