"""What an SAE is beside its tensors: what it was trained on, how often its latents fire, where it is kept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.errors import UserError

if TYPE_CHECKING:
    from saepipe.saes.base import SAE


_LAYER = re.compile(r"\b(?:blocks|layers|h)\.(\d+)\b")
_OPTIONAL = ("neuronpedia_id", "model_from_pretrained_kwargs", "hook_head_index", "hook_name_out", "seqpos_slice")
"""Names that SAELens's metadata always has; those that nothing was said of are None here, as they are there."""


class Metadata(dict[str, Any]):
    """What an SAE was trained on, under SAELens's names, as keys and as attributes: `metadata.hook_name`."""

    def __getattr__(self, name: str) -> Any:
        if name == "hook_layer" and name not in self:  # SAELens before version 6 kept it apart
            layer = _LAYER.search(str(self.get("hook_name")))
            return int(layer[1]) if layer else None
        if self.knows(name):
            return self.get(name)
        raise AttributeError(f"the metadata has no {name}; it has {', '.join(self) or 'nothing'}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def knows(self, name: str) -> bool:
        """Tell whether a name can be asked for as an attribute."""
        return name in self or name in (*_OPTIONAL, "hook_layer")

    def to_dict(self) -> dict[str, Any]:
        """Return it as a plain dictionary, as SAELens's users ask for it."""
        return dict(self)

    def compatibility_mode_of_training(self) -> bool | None:
        """Tell whether it was trained on HookedTransformer's numerics (folded and centred weights); None: who knows.

        A class called HookedTransformer says nothing, since SAELens loads it without processing unless
        `model_from_pretrained_kwargs` asks for some.
        """
        if isinstance(said := self.get("compatibility_mode"), bool):
            return said
        if self.get("model_class_name") == "AutoModelForCausalLM":
            return False
        kwargs = self.get("model_from_pretrained_kwargs")
        asked = [kwargs[name] for name in ("fold_ln", "center_writing_weights") if name in kwargs] if kwargs else []
        return any(asked) if asked else None


class Name(str):
    """A name that may be called for too: `cfg.architecture` is a method in SAELens 6, and was a value before."""

    def __call__(self) -> str:
        """Return the name."""
        return str(self)


class Stored:
    """The part of an SAE that knows of folders and releases; `sae, cfg_dict, sparsity = sae` takes it apart."""

    cfg: Any
    opened: bool = False
    """Whether it comes from a file, which may not say how it was trained."""
    use_error_term: bool = False
    """Add, in an autoencoder's `forward` and where it is attached to a model, what it lacks, held fixed."""
    log_sparsity: Float[Tensor, " d_sae"] | None = None
    """log10 of the fraction of tokens on which each latent fired, where the export has it."""

    @property
    def metadata(self) -> Metadata:
        """What it was trained on, where it was loaded from an export."""
        found: Metadata = self.cfg.metadata
        return found

    @metadata.setter
    def metadata(self, values: dict[str, Any]) -> None:
        self.cfg.metadata = Metadata(values)

    @property
    def cfg_dict(self) -> dict[str, Any]:
        """Its configuration with its metadata, flat, as SAELens's `cfg_dict` has it."""
        return {"hook_layer": self.metadata.hook_layer, **self.cfg.to_dict()}

    @property
    def device(self: Any) -> torch.device:
        """Where its weights are."""
        return self.W_dec.device

    @property
    def dtype(self: Any) -> torch.dtype:
        """Type of its weights."""
        return self.W_dec.dtype

    def get_name(self) -> str:
        """Name it by model, hook and width, as SAELens does."""
        return f"sae_{self.metadata.get('model_name')}_{self.metadata.get('hook_name')}_{self.cfg.d_sae}"

    def __iter__(self) -> Iterator[Any]:
        """Give SAE, configuration and sparsity, as SAELens's `from_pretrained` did before version 6."""
        yield from (self, self.cfg_dict, self.log_sparsity)

    def __getitem__(self, number: int) -> Any:
        """Give one of these three: `SAE.from_pretrained(...)[0]` is how it was written before version 6."""
        return (self, self.cfg_dict, self.log_sparsity)[number]

    @classmethod
    def from_pretrained(
        cls,
        release: str,
        sae_id: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        force_download: bool = False,
        *,
        fold_W_dec_norm: bool = False,
        revision: str | None = None,
        converter: Any = None,
    ) -> "SAE":
        """Load a published SAE; see `saepipe.pretrained.load`.

        Args:
            release: As there.
            sae_id: As there.
            device: As there.
            dtype: Type of the weights.
            force_download: As there.
            fold_W_dec_norm: Give every decoder row norm 1, which changes no output.
            revision: As there.
            converter: Not taken: an SAE in a format that is not known here is opened by code of your own.

        Raises:
            UserError: As there.
        """
        from saepipe import pretrained

        if converter is not None:
            raise UserError("converter is not taken; open the SAE with SAELens, save_model it, and give that folder")
        sae: SAE = pretrained.load(
            release, sae_id, device=device, dtype=dtype_of(dtype), revision=revision, force_download=force_download
        )
        if fold_W_dec_norm:
            sae.fold_W_dec_norm()
        return sae

    @classmethod
    def from_pretrained_with_cfg_and_sparsity(
        cls, release: str, sae_id: str | None = None, device: str = "cpu", **options: Any
    ) -> tuple["SAE", dict[str, Any], Tensor | None]:
        """Load a published SAE and take it apart: the SAE, its configuration, log10 of how often its latents fire."""
        sae = cls.from_pretrained(release, sae_id, device, **options)
        return sae, sae.cfg_dict, sae.log_sparsity

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32
    ) -> "SAE":
        """Open a folder or file in any format that is read here; see `saepipe.formats.load`."""
        from saepipe.formats import load

        return load(folder, device=device, dtype=dtype_of(dtype))

    @classmethod
    def load_from_disk(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
    ) -> "SAE":
        """Do as `load`, by SAELens's name."""
        return cls.load(path, device=device, dtype=dtype or torch.float32)

    load_from_pretrained = load_from_disk

    def save_model(self: Any, path: str | Path, sparsity: Float[Tensor, " d_sae"] | None = None) -> tuple[Path, Path]:
        """Write the SAE in SAELens's format, by SAELens's name.

        Args:
            path: Folder to write to.
            sparsity: Fraction of tokens on which each latent fired; None keeps what was loaded.

        Returns:
            The files of the weights and of the configuration.
        """
        from saepipe.formats import saelens, save

        save(self, path, sparsity=sparsity)
        path = Path(path).expanduser()
        return path / saelens.WEIGHTS, path / saelens.CONFIG


def dtype_of(given: torch.dtype | str) -> torch.dtype:
    """Find a type by its name; also by that of torch's, with `torch.` in front.

    Raises:
        UserError: There is no such type.
    """
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise UserError(f"dtype={given} is no type of torch's; give one such as float32 or bfloat16")
    return found
