"""The page that a published SAE has: what it is, what it is worth, how it was trained, how it is opened."""

from typing import TYPE_CHECKING, Any

import saepipe
from saepipe.formats.saelens import saelens_knows

if TYPE_CHECKING:
    from saepipe.saes.base import SAE

OURS = "- saepipe"
"""The tag that a card of ours has."""
_FIGURES = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "ce_loss_score": "CE score",
    "kl_div_score": "KL score",
    "dead_fraction": "dead latents, fraction",
    "tokens": "held-out tokens measured",
}
_ABOUT = {
    "model_name": "language model",
    "hook_name": "hook",
    "hook_name_out": "predicted hook",
    "context_size": "context size, tokens",
    "prepend_bos": "contexts begin with BOS",
    "dataset_path": "data",
}
_OPENED_BY = {
    "saelens": "from sae_lens import SAE\n\nsae = SAE.load_from_disk({folder})",
    "dictionary_learning": "from dictionary_learning.utils import load_dictionary\n\n"
    'sae, config = load_dictionary({folder}, device="cpu")',
    "sparsify": "from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk({folder})",
}
"""Format -> code of its own library that opens a folder."""


def model_card(
    sae: "SAE",
    *,
    format: str,
    repo: str | None = None,
    path: str = "",
    metrics: dict[str, Any] | None = None,
    config: str = "",
) -> str:
    """Write a model card.

    Args:
        sae: The SAE.
        format: Format of the files beside it.
        repo: Hub repository that it goes to; None leaves out how it is downloaded.
        path: Folder in the repository.
        metrics: What evaluation left.
        config: The run's config.yaml.
    """
    about = sae.metadata
    model = about.get("model_name")
    head = ["---", f"library_name: {'saelens' if format == 'saelens' else format}"]
    head += ["tags:", "- sparse-autoencoder", "- mechanistic-interpretability", OURS]
    head += (
        [f"base_model: {model}"]
        if isinstance(model, str) and model.count("/") == 1 and not model.startswith(("/", "."))
        else []
    )
    trained_as = about.get("training_architecture") or sae.cfg.architecture
    kind = f"{trained_as} {'transcoder' if sae.is_transcoder else 'sparse autoencoder'}"
    where = f" on `{about['hook_name']}`" if about.get("hook_name") else ""
    now = "" if trained_as == sae.cfg.architecture else f"{sae.cfg.architecture}, trained as "
    rows = [("architecture", f"{now}{trained_as}"), ("d_in", sae.d_in), ("d_sae", sae.d_sae)]
    rows += [("d_out", sae.d_out)] if sae.is_transcoder else []
    rows += [(words, about[key]) for key, words in _ABOUT.items() if about.get(key) is not None]
    parts = [
        "\n".join([*head, "---"]),
        f"# A {kind}{f' of {model}' if model else ''}{where}",
        _table([(words, f"`{value}`") for words, value in rows]),
    ]
    if metrics:
        figures = [(words, _shown(metrics[key])) for key, words in _FIGURES.items() if metrics.get(key) is not None]
        parts += ["## Metrics", "On documents that training never saw, special tokens and position 0 left out:"]
        parts.append(_table(figures))
    parts += ["## How to open it", *map(_code, _opening(sae, format, repo, path))]
    if config:
        parts += ["## Configuration", f"Trained with saepipe {saepipe.__version__}:", _code(config.strip(), "yaml")]
    return "\n\n".join(parts) + "\n"


def _opening(sae: "SAE", format: str, repo: str | None, path: str) -> list[str]:
    """Write the code that opens it, with saepipe and with the format's own library."""
    inside = f", {path!r}" if path else ""
    ours = f"from saepipe import SAE\n\nsae = SAE.from_pretrained({(repo or 'the folder')!r}{inside})"
    if format == "saelens" and not saelens_knows(sae):
        return [ours]
    if format == "saelens" and repo:
        return [ours, f"from sae_lens import SAE\n\nsae = SAE.from_pretrained({repo!r}, {path or '.'!r})"]
    return [ours, _OPENED_BY[format].format(folder=repr("the folder"))]


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["|  |  |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
