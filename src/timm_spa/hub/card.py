"""Model cards, made of what was measured and of nothing else."""
from pathlib import Path
from typing import Any, Mapping, Optional, Union

from huggingface_hub import ModelCard

from .run_record import Run

__all__ = ['CardError', 'make_card']


class CardError(ValueError):
    """A card lacks a fact that it cannot do without, or two facts contradict; the message says which and where."""


def make_card(
        model_name: str,
        repo_id: Optional[str] = None,
        run: Optional[Run] = None,
        *,
        config: Mapping[str, Any],
        weights: Optional[Union[str, Path]] = None,
        epoch: Optional[int] = None,
        results: Optional[Union[str, Path]] = None,
) -> ModelCard:
    """Makes the card of a repository. A fact that is not known leaves its line out.

    Args:
        model_name: Name of the weights, architecture and tag, e.g. 'spa_resnet50.tmm_in1k'.
        repo_id: Repository, 'organization/name'. None for weights that come with the package.
        run: What lies beside the checkpoint.
        config: Content of the repository's config.json.
        weights: The safetensors file, to state how it is stored.
        epoch: Epoch of the run that the weights are of (a training checkpoint knows it); the accuracy is then that of
            its row in summary.csv, unless card.yaml has one that was measured on the published file. If None, it is
            taken from the metadata of `weights` ('epoch'), if it is there.
        results: Folder of a sweep, `train_scripts/results/<sweep>`, with the controls to compare with.

    Returns:
        The card; `card.save(path)` writes it.

    Raises:
        CardError: A fact is missing that a card must state, or facts contradict each other.
        RunError: A file of a control's run cannot be read.
        SummaryError: The metrics of a control are no table.
    """
    raise NotImplementedError
