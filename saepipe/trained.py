"""A trained SAE with its language model, as the verbs that ask what its latents do open it, and where they write."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from saepipe import durable, entry, formats, latent_labels, reading
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.latents import Contexts
from saepipe.reading import Reading, Texts
from saepipe.runs import Run
from saepipe.saes.base import SAE
from saepipe.splicing import Splice


@dataclass(frozen=True)
class Trained:
    """A finished run's SAE, or an exported one, in its language model."""

    config: RunConfig
    """The run's own configuration, with what the verb was asked for."""
    run: Run
    model: HookedSAETransformer
    sae: SAE
    """On the model's device."""

    @classmethod
    def open(cls, config: RunConfig) -> "Trained":
        """Open the SAE and its model.

        Args:
            config: `run.dir` names a finished run, or the folder of an exported SAE, which says of what model it is
                where no key does.

        Raises:
            UserError: There is neither, or the model cannot be loaded.
        """
        config = entry.settled(config)
        run = Run(config.run.dir)
        if not run.config_file.exists() and (run.folder / "cfg.json").is_file():
            sae = formats.load(run.folder)
            splice = Splice(sae)
            told: dict[str, Any] = {
                "name": sae.metadata.get("model_name") or config.model.name,
                "compatibility_mode": bool(sae.metadata.compatibility_mode_of_training()),
            }
            told = {key: value for key, value in told.items() if not config.typed(f"model.{key}")}
            if not isinstance(told.get("name", ""), str):
                raise UserError(
                    f"run.dir={run.folder}: cfg.json says model_name={told['name']}, which is no name; give model.name="
                )
            hooks = list(dict.fromkeys([splice.hook_in, splice.hook_out]))
            config.model = replace(config.model, hooks=hooks, **told)
        else:
            config = run.finished_config(config)
            sae = run.load_sae()
        model = HookedSAETransformer.from_config(config.model)
        return cls(config, run, model, sae.to(model.hf_model.device))

    def reading(self, group: str, texts: str | None, tokens: int, batch_prompts: int) -> Reading:
        """Choose what to measure on: the user's texts, as far as the model's context goes, or the run's held-out ones.

        Args:
            group: The verb's group of keys.
            texts: Its key `texts`.
            tokens: Most tokens of the store to read.
            batch_prompts: Contexts per forward pass.

        Raises:
            UserError: A text holds nothing, or the run's store is gone.
        """
        if texts is not None:
            name = f"{group}.texts"
            return Texts(self.model, reading.texts_of(texts, "text", name), name=name, truncate=True).batches(
                batch_prompts
            )
        try:
            if not self.run.config_file.exists():
                raise UserError(f"run.dir={self.run.folder} is an exported SAE and has no store; name its run")
            contexts = Contexts(self.run.tokens(self.config.store.dir), tokens)
        except UserError as error:
            raise UserError(f"{error}, or give texts of your own with {group}.texts=") from error
        return reading.contexts(contexts, batch_prompts)

    @cached_property
    def labels(self) -> dict[int, str]:
        """What `saepipe.analyze` called the latents; none where it did not."""
        file = self.run.folder / "features" / latent_labels.FILE
        return latent_labels.read(file, self.sae.d_sae) if file.exists() else {}

    def write(self, verb: str, name: Sequence[object], result: dict[str, Any]) -> Path:
        """Write a result as JSON into the run's folder; what was asked for in the same words is replaced.

        Args:
            verb: Folder in the run's folder, and the group of keys that says what was asked for.
            name: What the file's name begins with; it ends with a digest of the group's keys.
            result: JSON values.
        """
        asked = json.dumps(asdict(getattr(self.config, verb)), sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:6]
        words = (re.sub(r"[^\w.+-]+", "_", str(word)).strip("_") for word in name)
        stem = "-".join(filter(None, words)).encode()[:100].decode(errors="ignore")  # file systems count bytes
        path = self.run.folder / verb / f"{stem or verb}-{digest}.json"
        with durable.disk_errors("run.dir", self.run.folder):
            durable.write_text(path, json.dumps(result, indent=1, allow_nan=False))
        return path


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out for a terminal, the first of which is the head: numbers, and text in the last column."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for *numbers, text in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths, strict=True)]
        lines.append("  ".join(["", *cells, text]).rstrip())
    return "\n".join(lines)
