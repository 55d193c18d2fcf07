"""Accuracy in the Hub's format for benchmarks, `.eval_results/*.yaml`."""
import re
from typing import Dict, Mapping

import yaml

from .upload import PublishError

__all__ = ['FOLDER', 'eval_results']

FOLDER = '.eval_results'


def eval_results(dataset: Mapping[str, str], scores: Mapping[int, float]) -> Dict[str, str]:
    """Returns the file with the accuracy of a model on a benchmark of the Hub, by its path in the repository.

    Args:
        dataset: Facts about the dataset. Only a benchmark has 'task_id', the id of a task in its eval.yaml.
        scores: Accuracy in percent by k.

    Returns:
        Path and content; empty if the dataset is not a benchmark, or without an accuracy.

    Raises:
        PublishError: The installed huggingface_hub is too old.
    """
    if not {'id', 'task_id'} <= dataset.keys() or 1 not in scores:
        return {}
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as e:
        raise PublishError(
            "'task_id' in card.yaml needs a newer huggingface_hub: pip install --upgrade huggingface_hub, or remove "
            'task_id.') from e
    split = f', split {dataset["split"]}' if 'split' in dataset else ''
    entry = EvalResultEntry(
        dataset_id=dataset['id'], task_id=dataset['task_id'], value=scores[1],
        notes=f'top-1 accuracy in percent{split}')
    name = re.sub(r'[^\w.-]', '-', dataset['id'].rpartition('/')[2])
    return {f'{FOLDER}/{name}.yaml': yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)}
