"""Generate with latents of a trained SAE added, clamped or ablated.

    python -m saepipe.steer run.dir=runs/x steer.latents=[12] steer.strength=4 steer.prompt="The"

Heavy imports stand inside the functions, so that `--help` and a mistyped key answer at once.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

from saepipe import entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained, explained_memory
from saepipe.latent_keys import SteerConfig

if TYPE_CHECKING:
    from saepipe.steering import Steer
    from saepipe.trained import Trained

log = logging.getLogger(__name__)


def steer(config: RunConfig) -> dict[str, Any]:
    """Generate texts with some latents steered, and as many without, and write both to `steer/` in the run's folder.

    Args:
        config: `run.dir` names the run, or an exported SAE; the steer group says what to do.

    Returns:
        mode, strength, latents (of each: latent, label where `saepipe.analyze` gave one, typical, amount in its own
        units), prompt, seed, plain and steered (the texts), file.

    Raises:
        UserError: No finished run, no such latent, one whose typical activation is not known, a prompt that is too
            long.
    """
    from saepipe.trained import Trained

    asked = entry.settled(config).steer
    if not asked.latents:
        raise UserError("steer.latents=[] names no latent; give some, such as steer.latents=[12]")
    trained = Trained.open(config)
    _check_room(trained, asked)
    made, typical = _steered_by(trained, asked)

    def written(**keys: Any) -> list[str]:
        texts = trained.model.generate(
            [asked.prompt] * asked.samples,
            max_new_tokens=asked.tokens,
            stop_at_eos=trained.model.tokenizer.eos_token_id is not None,
            temperature=asked.temperature,
            seed=asked.seed,
            return_type="str",
            **keys,
        )
        return list(texts)

    with explained_memory("generation", steer__samples=asked.samples):
        plain, steered = written(), written(fwd_hooks=made.fwd_hooks)
    result = {
        "run_dir": str(trained.run.folder),
        "mode": asked.mode,
        "strength": asked.strength if asked.mode != "ablate" else None,
        "latents": [
            {"latent": latent, "label": trained.labels.get(latent), "typical": typical.get(latent), "amount": amount}
            for latent, amount in made.amounts.items()
        ],
        "positions": asked.positions,
        "prompt": asked.prompt,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "plain": plain,
        "steered": steered,
    }
    strengths = [] if asked.mode == "ablate" else dict.fromkeys(asked.strengths)
    name = [asked.mode, *made.amounts, *(f"{one:g}" for one in strengths), asked.prompt]
    result["file"] = str(trained.write("steer", name, result))
    log.info("%s", table(result))
    return result


def _check_room(trained: "Trained", asked: SteerConfig) -> None:
    """Refuse what does not fit, before anything is measured."""
    with explained("steer.prompt"):
        length = trained.model.read(asked.prompt).lengths[0]
    limit = trained.model.context_limit
    if limit is not None and length + asked.tokens > limit:
        raise UserError(
            f"steer.tokens={asked.tokens} after a prompt of {length} tokens is more than the {limit} that "
            f"{trained.model.model_name} can read; give at most {limit - length}"
        )
    if asked.positions is not None and max(asked.positions) >= length + asked.tokens:
        raise UserError(
            f"steer.positions={asked.positions} goes beyond the prompt and what is generated; the last position is "
            f"{length + asked.tokens - 1}"
        )


def _steered_by(trained: "Trained", asked: SteerConfig) -> "tuple[Steer, dict[int, float]]":
    """Put the steering together, and measure the latents' typical activations where they are needed."""
    from saepipe.steering import Steer, check_latents
    from saepipe.typical import Typical

    sae = trained.sae
    with explained("steer.latents"):
        check_latents(sae, asked.latents)
    if asked.mode == "ablate":
        return Steer(sae, asked.latents, "ablate", positions=asked.positions), {}
    typical = {}
    if asked.typical is not None:
        typical = dict.fromkeys(asked.latents, asked.typical)
    else:
        reading = trained.reading("steer", asked.texts, asked.typical_tokens, asked.batch_prompts)
        with explained_memory("measuring typical activations", steer__batch_prompts=asked.batch_prompts):
            found = Typical.measure(trained.model, sae, reading)
        with explained("steer.typical"):
            typical = {latent: found.of(latent) for latent in asked.latents}
    strengths = zip(asked.latents, asked.strengths, strict=True)
    amounts = {latent: strength * typical[latent] for latent, strength in strengths}
    return Steer(sae, amounts, asked.mode, positions=asked.positions), typical


def table(result: dict[str, Any]) -> str:
    """Lay the texts out for the terminal."""
    what = {"add": "added", "clamp": "held", "ablate": "ablated"}[result["mode"]]
    prompt = json.dumps(result["prompt"], ensure_ascii=False)
    lines = [f"{result['run_dir']}: latents {what} while the model goes on from {prompt}"]
    for one in result["latents"]:
        times = "" if one["typical"] is None else f"{one['amount'] / one['typical']:.3g} times the typical"
        of = times and f" at {one['amount']:.4g}, {times}"
        label = f" ({one['label']})" if one["label"] else ""
        lines.append(f"  latent {one['latent']}{label}{of}")
    for name in ("plain", "steered"):
        lines += [f"{name}:", *(f"  {json.dumps(text, ensure_ascii=False)}" for text in result[name])]
    return "\n".join([*lines, result["file"]])


def main() -> None:
    """Run the verb from the command line."""
    entry.main("steer", steer)


if __name__ == "__main__":
    main()
