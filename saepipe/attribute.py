"""What the latents of a trained SAE have to do with a prediction, and what the model loses without them.

    python -m saepipe.attribute run.dir=runs/x attribute.prompt="GET /index.html" attribute.target=" HTTP"
    python -m saepipe.attribute run.dir=runs/x attribute.ablate=[12,40]

Heavy imports stand inside the functions, so that `--help` and a mistyped key answer at once.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

from saepipe import entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained, explained_memory
from saepipe.latent_keys import AttributeConfig

if TYPE_CHECKING:
    from saepipe.trained import Trained

log = logging.getLogger(__name__)


def attribute(config: RunConfig) -> dict[str, Any]:
    """Attribute a logit to latents, measure ablations of latents, or both; writes to `attribute/` in the run's folder.

    Args:
        config: `run.dir` names the run, or an exported SAE; the attribute group says what to look at.

    Returns:
        Where a prompt is given: prompt, target, against, logit, direct (parts, and of the latents with the largest:
        latent, activation, adds; None where the SAE's hook does not write to the residual stream) and gradient (logit,
        without, total, and of the strongest: position, token, latent, activation, effect). Where latents are to be
        ablated: ablation (of each: latent, ce_increase, ce_interval, ce_increase_where_active, active, tokens). With
        each latent its label, where `saepipe.analyze` gave one. And file.

    Raises:
        UserError: No finished run, nothing to do, a token that is none, a prompt that is too long, no such latent.
    """
    from saepipe.trained import Trained

    asked = entry.settled(config).attribute
    if asked.prompt is None and not asked.ablate:
        raise UserError(
            "attribute.prompt is not set, nor is attribute.ablate; give a text whose next token to look at, or latents "
            "to ablate"
        )
    trained = Trained.open(config)
    result: dict[str, Any] = {"run_dir": str(trained.run.folder)}
    if asked.prompt is not None:
        result |= _attributed(trained, asked)
    if asked.ablate:
        result["ablation"] = _ablated(trained, asked)
    name = ["logit", result["target"], asked.prompt] if asked.prompt is not None else ["ablate", *asked.ablate]
    result["file"] = str(trained.write("attribute", name, result))
    log.info("%s", table(result))
    return result


def _attributed(trained: "Trained", asked: AttributeConfig) -> dict[str, Any]:
    """Attribute the logit."""
    from saepipe import places
    from saepipe.attribution import by_gradient, direct
    from saepipe.splicing import Splice

    assert asked.prompt is not None
    model, sae, shown = trained.model, trained.sae, asked.latents
    with explained("attribute.prompt"):
        words = model.to_str_tokens(model.read(asked.prompt).ids[0])
    if not -len(words) <= asked.position < len(words):
        raise UserError(
            f"attribute.position={asked.position} is none of the prompt's {len(words)}; give one from 0 to "
            f"{len(words) - 1}, or -1 for the last"
        )
    target: str | int = (  # the likeliest by its number: its text may be a part of a character, which no text gives
        int(model(asked.prompt)[0, asked.position].argmax()) if asked.target is None else asked.target
    )
    with explained("attribute"), explained_memory("attribution", attribute__steps=asked.steps or 1):
        parts = None
        if Splice(sae).hook_out.rsplit(".")[-1] in places.RESIDUAL:
            parts = direct(model, sae, asked.prompt, target, asked.against, position=asked.position)
        gradient = by_gradient(
            model, sae, asked.prompt, target, asked.against, position=asked.position, steps=asked.steps
        )
    flat = gradient.latents.flatten()
    strongest = flat.abs().topk(min(shown, int((flat != 0).sum()))).indices.tolist()
    places_of = [divmod(number, sae.d_sae) for number in strongest]
    return {
        "prompt": asked.prompt,
        "tokens": words,
        "position": asked.position % len(words),
        "target": target if isinstance(target, str) else model.to_single_str_token(target),
        "against": asked.against,
        "logit": gradient.logit,
        "direct": parts
        and {
            "latents": [
                {
                    "latent": latent,
                    "label": trained.labels.get(latent),
                    "activation": float(parts.activations[latent]),
                    "adds": float(parts.latents[latent]),
                }
                for latent in parts.latents.abs().topk(min(shown, sae.d_sae)).indices.tolist()
                if parts.latents[latent]
            ],
            "all_latents": float(parts.latents.double().sum()),
            **{name: getattr(parts, name) for name in ("bias", "error", "others", "constant", "total", "logit")},
        },
        "gradient": {
            "steps": asked.steps,
            "latents": [
                {
                    "position": position,
                    "token": words[position],
                    "latent": latent,
                    "label": trained.labels.get(latent),
                    "activation": float(gradient.activations[position, latent]),
                    "effect": float(gradient.latents[position, latent]),
                }
                for position, latent in places_of
            ],
            **{name: getattr(gradient, name) for name in ("total", "without")},
        },
    }


def _ablated(trained: "Trained", asked: AttributeConfig) -> list[dict[str, Any]]:
    """Measure the ablations; what has no value is None."""
    from saepipe.ablation import ablation_effects
    from saepipe.steering import check_latents

    with explained("attribute.ablate"):
        check_latents(trained.sae, asked.ablate)
    reading = trained.reading("attribute", asked.texts, asked.tokens, asked.batch_prompts)
    with explained_memory("ablation", attribute__batch_prompts=asked.batch_prompts):
        effects = ablation_effects(trained.model, trained.sae, asked.ablate, reading)
    found = []
    for one in effects:
        values = {key: None if value != value else value for key, value in vars(one).items()}  # NaN is not itself
        found.append({**values, "label": trained.labels.get(one.latent)})
    return found


def table(result: dict[str, Any]) -> str:
    """Lay the result out for the terminal."""
    from saepipe import trained

    lines = []
    if "prompt" in result:
        against = result["against"]
        less = "" if against is None else f" less that of {json.dumps(against, ensure_ascii=False)}"
        after = json.dumps("".join(result["tokens"][: result["position"] + 1]), ensure_ascii=False)
        of = json.dumps(result["target"], ensure_ascii=False)
        lines.append(f"logit of {of}{less} after {after}: {result['logit']:.3f}")
    if parts := result.get("direct"):
        named = {
            "all latents": parts["all_latents"],
            "the SAE's bias": parts["bias"],
            "the SAE's error": parts["error"],
            "other parts of the model": parts["others"],
            "constant": parts["constant"],
            "sum (before a cap on logits)": parts["total"],
        }
        rows = [
            [f"{one['adds']:+.3f}", f"{one['activation']:.3f}", str(one["latent"]), one["label"] or ""]
            for one in parts["latents"]
        ]
        lines += ["direct:", trained.table([["adds", "active at", "latent", ""], *rows])]
        lines += [f"  {value:+9.3f}  {name}" for name, value in named.items()]
    if gradient := result.get("gradient"):
        how = "one gradient" if gradient["steps"] is None else f"integrated gradients, {gradient['steps']} steps"
        rows = [
            [
                f"{one['effect']:+.3f}",
                f"{one['activation']:.3f}",
                str(one["position"]),
                json.dumps(one["token"], ensure_ascii=False),
                str(one["latent"]),
                one["label"] or "",
            ]
            for one in gradient["latents"]
        ]
        head = ["effect", "active at", "position", "token", "latent", ""]
        lines += [f"by gradient ({how}):", trained.table([head, *rows])]
        lines += [
            f"  sum over all {gradient['total']:+.3f}; without any latent the logit is {gradient['without']:.3f}, "
            f"{result['logit'] - gradient['without']:+.3f} less"
        ]
    if effects := result.get("ablation"):
        lines += [f"cross-entropy without a latent, on {effects[0]['tokens']:,} tokens (nats per token):"]
        rows = []
        for one in effects:
            low_high, where = one["ce_interval"], one["ce_increase_where_active"]
            rows.append(
                [
                    f"{one['ce_increase']:+.6f}",
                    "-" if low_high is None else f"[{low_high[0]:+.6f}, {low_high[1]:+.6f}]",
                    "-" if where is None else f"{where:+.4f}",
                    f"{one['active']:,}",
                    str(one["latent"]),
                    one["label"] or "",
                ]
            )
        head = ["rise", "95 % interval", "where active", "active on", "latent", ""]
        lines += [trained.table([head, *rows])]
    return "\n".join([*lines, result["file"]])


def main() -> None:
    """Run the verb from the command line."""
    entry.main("attribute", attribute)


if __name__ == "__main__":
    main()
