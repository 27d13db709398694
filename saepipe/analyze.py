"""Look at what the latents of a trained SAE respond to: `python -m saepipe.analyze run.dir=runs/x`.

The language model reads held-out contexts once, and `features/index.html` shows the contexts that activate each latent
most. Special tokens and position 0 are left out of every activation, density and histogram. Heavy imports stand inside
the functions, so that `--help` and a mistyped key answer at once.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.errors import explained_memory
from saepipe.feature_page import Excerpt, FeaturePage, Latent
from saepipe.runs import Run

if TYPE_CHECKING:
    from saepipe.latents import Contexts, LatentActivity
    from saepipe.saes.base import SAE
    from saepipe.token_text import TokenText

log = logging.getLogger(__name__)


def analyze(config: RunConfig) -> dict[str, Any]:
    """Write the feature page of a finished run, `features/index.html`.

    Args:
        config: `run.dir` names the run, the analyze group says how much to read and show; all else is the run's own.

    Returns:
        page (its path), latents_shown, live, dead, tokens, seconds, tokens_per_s.

    Raises:
        UserError: No finished run, no token store, a model that cannot be loaded, out of memory.
    """
    from saepipe.language_model import LanguageModel
    from saepipe.latents import Contexts, observe
    from saepipe.token_text import TokenText

    config = entry.settled(config)
    run = Run(config.run.dir)
    config = run.finished_config(config)
    contexts = Contexts(run.tokens(config.store.dir), config.analyze.tokens)
    model = LanguageModel.open(config.model)
    sae = run.load_sae().to(model.device)
    if contexts.training_tokens:
        log.info("%s", _read_what(contexts))
    began = time.perf_counter()
    with explained_memory("analysis", analyze__batch_prompts=config.analyze.batch_prompts):
        activity = observe(model, sae, contexts, config.analyze.contexts, batch_prompts=config.analyze.batch_prompts)
    seconds = time.perf_counter() - began
    page = _page(config, run, sae, contexts, activity, TokenText(model.tokenizer))
    path = run.folder / "features" / "index.html"
    with durable.disk_errors("run.dir", run.folder):
        durable.write_text(path, page.html())
    tokens = contexts.held_out_tokens + contexts.training_tokens
    live = int((activity.fired > 0).sum())
    log.info("%s: %s of %s live latents, from %s tokens", path, len(page.latents), f"{live:,}", f"{tokens:,}")
    return {
        "page": str(path),
        "latents_shown": len(page.latents),
        "live": live,
        "dead": sae.d_sae - live,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds),
    }


def _page(
    config: RunConfig, run: Run, sae: "SAE", contexts: "Contexts", activity: "LatentActivity", text: "TokenText"
) -> FeaturePage:
    """Put the page together."""
    fired = activity.fired.cpu()
    density = (fired.double() / max(activity.tokens, 1)).tolist()
    tops = activity.histogram_top.tolist()
    shown = [
        Latent(
            index=latent,
            density=density[latent],
            maximum=float(activity.maxima[latent]),
            histogram=activity.histogram[latent].tolist(),
            histogram_top=tops[latent],
            excerpts=_excerpts(latent, contexts, activity, text),
        )
        for latent in activity.spread(config.analyze.latents)
    ]
    live = int((fired > 0).sum())
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
    note = (
        f"{_read_what(contexts)}; special tokens and position 0 are left out. "
        f"{len(shown):,} of {live:,} live latents are shown, drawn evenly over their densities."
    )
    return FeaturePage(str(run.folder), facts, note, density, activity.tokens, shown)


def _read_what(contexts: "Contexts") -> str:
    """Say what the figures are from."""
    held_out, training = f"{contexts.held_out_tokens:,}", f"{contexts.training_tokens:,}"
    if not contexts.training_tokens:
        return f"Read {held_out} tokens of held-out documents"
    if not contexts.held_out_tokens:
        return f"Read {training} tokens of training documents, for want of held-out ones"
    return f"Read all {held_out} tokens of held-out documents and, for want of more, {training} of training documents"


def _excerpts(latent: int, contexts: "Contexts", activity: "LatentActivity", text: "TokenText") -> list[Excerpt]:
    """Cut the texts in which a latent is most active."""
    from saepipe.latents import AFTER, BEFORE

    excerpts = []
    columns = (activity.values, activity.contexts, activity.positions, activity.windows)
    for value, context, position, window in zip(*(column[:, latent].tolist() for column in columns), strict=True):
        if value > 0:
            ids = contexts.ids(context)
            start, stop = max(0, position - BEFORE), min(len(ids), position + AFTER + 1)
            seen = window[start - position + BEFORE : stop - position + BEFORE]
            pieces = text.pieces(ids[start:stop])
            shown = [(piece, max(seen[piece.start : piece.stop])) for piece in pieces]
            while shown and shown[0][0].broken and not shown[0][1]:  # the cut went through a character
                shown.pop(0)
            while shown and shown[-1][0].broken and not shown[-1][1]:
                shown.pop()
            excerpts.append(Excerpt([(piece.text, activation) for piece, activation in shown]))
    return excerpts


def main() -> None:
    """Run the verb from the command line."""
    entry.main("analyze", analyze)


if __name__ == "__main__":
    main()
