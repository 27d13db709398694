"""Measure a trained SAE on documents it was never trained on: `python -m saepipe.evaluate run.dir=runs/x`.

Heavy imports stand inside the function, so that `--help` and a mistyped key answer at once.
"""

import json
import logging
import math
import time
from typing import Any

from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained_memory
from saepipe.runs import Run

log = logging.getLogger(__name__)

TABLE = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "ce_loss_score": "CE score",
    "kl_div_score": "KL score",
    "dead_fraction": "dead latents",
    "ce_loss_without_sae": "CE loss, model alone",
    "ce_loss_with_sae": "CE loss, with the SAE",
    "ce_loss_with_ablation": "CE loss, hook zeroed",
}
"""Figures of the table that is printed -> their words; metrics.json has more."""


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Measure a finished run on held-out documents and write `eval/metrics.json`.

    With `evaluate.step`, an intermediate SAE of a run, finished or not; then it is `eval/step-<step>.json`.

    Args:
        config: `run.dir` names the run; `evaluate.tokens` says how much to read; all else is the run's own.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: No finished run, no tokens, a model that cannot be loaded, out of memory.
    """
    from saepipe.language_model import LanguageModel
    from saepipe.measure import measure

    config = entry.settled(config)
    run = Run(config.run.dir)
    config = run.finished_config(config)
    tokens = run.tokens(config.store.dir)
    if not len(tokens.heldout):
        raise UserError(
            f"data.held_out={config.data.held_out} left no whole context of held-out documents in {tokens.folder}; "
            "cache a store with more documents or a larger data.held_out"
        )
    model = LanguageModel.open(config.model)
    sae = run.load_sae(config.evaluate.step).to(model.device)
    hook, target_hook = sae.metadata["hook_name"], sae.metadata.get("hook_name_out")
    began = time.perf_counter()
    with explained_memory("evaluation", evaluate__batch_prompts=config.evaluate.batch_prompts):
        result = measure(
            model,
            sae,
            tokens.heldout,
            hook,
            config.evaluate.tokens,
            batch_prompts=config.evaluate.batch_prompts,
            target_hook=target_hook,
            inclusive=config.evaluate.inclusive,
        )
    seconds = time.perf_counter() - began
    result |= {
        "hook": hook,
        "target_hook": target_hook or hook,
        "run_dir": str(run.folder),
        "step": config.evaluate.step,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(result["tokens"] / seconds),
    }
    with durable.disk_errors("run.dir", run.folder):
        finite = {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in result.items()
        }
        name = "metrics.json" if config.evaluate.step is None else f"step-{config.evaluate.step:09d}.json"
        durable.write_text(run.folder / "eval" / name, json.dumps(finite, indent=1, allow_nan=False))
    log.info("%s", table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """Lay the main figures out for the terminal."""
    width = max(len(words) for words in TABLE.values())
    rows = [f"  {words:<{width}}  {_shown(key, result[key])}" for key, words in TABLE.items()]
    step = "" if result["step"] is None else f" at step {result['step']:,}"
    head = f"{result['run_dir']}{step}: {result['tokens']:,} tokens of {result['documents']:,} held-out documents"
    return "\n".join([head, *rows])


def _shown(key: str, value: float) -> str:
    return f"{value:.2%}" if key.endswith("fraction") else f"{value:.4g}"


def main() -> None:
    """Run the verb from the command line."""
    entry.main("evaluate", evaluate)


if __name__ == "__main__":
    main()
