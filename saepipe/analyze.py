"""Look at what the latents of a trained SAE respond to: `python -m saepipe.analyze run.dir=runs/x`.

The language model reads held-out contexts once, and `features/index.html` shows the contexts that activate each latent
most, others drawn from each range of its activations, its histogram, its effect on the logits and its neighbours.
Special tokens and position 0 are left out of every activation, density and histogram. Heavy imports stand inside the
functions, so that `--help` and a mistyped key answer at once.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from saepipe import entry, latent_labels, neuronpedia
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained_memory
from saepipe.feature_page import FeaturePage
from saepipe.runs import Run, warn_of_another_model

if TYPE_CHECKING:
    from saepipe.features import Features
    from saepipe.latents import Contexts
    from saepipe.saes.base import SAE

log = logging.getLogger(__name__)


def analyze(config: RunConfig) -> dict[str, Any]:
    """Write the feature page of a finished run, `features/index.html`.

    Args:
        config: `run.dir` names the run, the analyze group says how much to read and show; all else is the run's own.

    Returns:
        page (its path), latents_shown, live, dead, tokens, seconds, tokens_per_s.

    Raises:
        UserError: No finished run, no token store, a model that cannot be loaded, a latent that the SAE does not have,
            out of memory.
    """
    from saepipe.features import Features
    from saepipe.language_model import LanguageModel
    from saepipe.latents import Contexts, observe

    config = entry.settled(config)
    run = Run(config.run.dir)
    config = run.finished_config(config)
    contexts = Contexts(run.tokens(config.store.dir), config.analyze.tokens)
    model = LanguageModel.open(config.model)
    warn_of_another_model(config.store.dir, model.name, model.identity)
    sae = run.load_sae().to(model.device)
    _check(config.analyze.latents, sae.d_sae)
    labels = latent_labels.read(config.analyze.labels, sae.d_sae) if config.analyze.labels else {}
    if contexts.training_tokens:
        log.info("%s", _read_what(contexts))
    began = time.perf_counter()
    with explained_memory("analysis", analyze__batch_prompts=config.analyze.batch_prompts):
        activity = observe(model, sae, contexts, config.analyze.contexts, batch_prompts=config.analyze.batch_prompts)
        seconds = time.perf_counter() - began
        features = Features.gather(model, sae, contexts, activity)
        shown = _chosen(config.analyze.latents, features)
        page = _page(config, run, sae, features, shown, labels)
        path = page.write(run.folder / "features")
    tokens = contexts.held_out_tokens + contexts.training_tokens
    live = len(features.live)
    log.info("%s: %s of %s live latents, from %s tokens", path, f"{len(shown):,}", f"{live:,}", f"{tokens:,}")
    for key, named in (("latents", config.analyze.latents), ("labels", list(labels))):
        if isinstance(named, list) and (said := _left_out(named, shown, features)):
            log.info("analyze.%s: %s", key, said)
    return {
        "page": str(path),
        "latents_shown": len(shown),
        "live": live,
        "dead": sae.d_sae - live,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds),
    }


def _check(asked: int | list[int] | None, d_sae: int) -> None:
    """Refuse latents that the SAE does not have."""
    beyond = [latent for latent in asked if latent >= d_sae] if isinstance(asked, list) else []
    if beyond:
        raise UserError(f"analyze.latents names latent {beyond[0]}; the SAE has 0 to {d_sae - 1}")


def _chosen(asked: int | list[int] | None, features: "Features") -> list[int]:
    """Choose the latents to show, by rising number: those that are named, of the live ones, or a number of these."""
    if isinstance(asked, list):
        return sorted(set(asked) & set(features.live))
    return features.activity.spread(asked or len(features.live))


def _left_out(named: list[int], shown: list[int], features: "Features") -> str:
    """Say which of some latents are not on the page, and what would show them; nothing where all are there."""
    missing = set(named) - set(shown)
    dead = missing - set(features.live)
    said = [f"not on the page: {len(missing):,} of the {len(named):,} latents that it names"]
    if missing - dead:
        said.append(f"analyze.latents=null would show {_some(missing - dead)}")
    if dead:
        said.append(f"{_some(dead)} did not fire on these tokens; analyze.tokens would have to be larger")
    return "; ".join(said) if missing else ""


def _some(latents: set[int]) -> str:
    first = ", ".join(map(str, sorted(latents)[:5]))
    return f"{first} and {len(latents) - 5:,} more" if len(latents) > 5 else first


def _page(
    config: RunConfig, run: Run, sae: "SAE", features: "Features", shown: list[int], labels: dict[int, str]
) -> FeaturePage:
    """Put the page together."""
    activity = features.activity
    fired = activity.fired.cpu()
    live = len(features.live)
    facts = {
        "model": config.model.name,
        "hook": sae.metadata["hook_name"],
        **({"predicted hook": sae.metadata["hook_name_out"]} if sae.is_transcoder else {}),
        "architecture": sae.cfg.architecture,
        "latents (d_sae)": f"{sae.d_sae:,}",
        "L0": f"{float(fired.sum()) / max(activity.tokens, 1):.1f}",
        "live": f"{live:,}",
        "dead": f"{sae.d_sae - live:,} ({1 - live / sae.d_sae:.1%})",
    }
    said = [f"{_read_what(features.contexts)}; special tokens and position 0 are left out."]
    if len(shown) < live:
        how = "those named" if isinstance(config.analyze.latents, list) else "drawn evenly over their densities"
        said.append(f"{len(shown):,} of {live:,} live latents are shown, {how}.")
    if features.without_effects:
        said.append(f"No effects on logits: {features.without_effects}.")
    return FeaturePage(
        title=str(run.folder),
        facts=facts,
        note=" ".join(said),
        densities=(fired.double() / max(activity.tokens, 1)).tolist(),
        tokens=activity.tokens,
        latents=features.of(shown, labels),
        address=neuronpedia.page(sae, 0).removesuffix("0") if sae.metadata.get("neuronpedia_id") else None,
    )


def _read_what(contexts: "Contexts") -> str:
    """Say what the figures are from."""
    held_out, training = f"{contexts.held_out_tokens:,}", f"{contexts.training_tokens:,}"
    if not contexts.training_tokens:
        return f"Read {held_out} tokens of held-out documents"
    if not contexts.held_out_tokens:
        return f"Read {training} tokens of training documents, for want of held-out ones"
    return f"Read all {held_out} tokens of held-out documents and, for want of more, {training} of training documents"


def main() -> None:
    """Run the verb from the command line."""
    entry.main("analyze", analyze)


if __name__ == "__main__":
    main()
