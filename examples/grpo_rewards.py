"""Rewards of orders as JSON. Each gets all completions of a step, and the rows' columns."""

import json


def read(completion):
    """The record that a completion is, None where it is no JSON object."""
    try:
        record = json.loads(completion[-1]["content"])
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def valid_json(completions, **columns):
    """1 for a JSON object, else 0."""
    return [float(read(completion) is not None) for completion in completions]


def right_fields(completions, reference, **columns):
    """The share of the fields that are those of the row's own answer."""
    rewards = []
    for completion, answer in zip(completions, reference, strict=True):
        found, wanted = read(completion) or {}, json.loads(answer)
        right = sum(key in found and found[key] == value for key, value in wanted.items())
        rewards.append(right / max(len(found), len(wanted)))
    return rewards
