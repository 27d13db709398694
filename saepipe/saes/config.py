"""Keys that every architecture honours; those of its own are in its own file."""

from dataclasses import dataclass
from typing import Any

from saepipe.errors import UserError
from saepipe.keys import Group, key

NORMALISATIONS = ("none", "expected_average_only_in")
MSE_REDUCTIONS = ("sum", "mean")
B_DEC_INIT_METHODS = ("mean", "geometric_median", "zeros")
DEAD_METHODS = ("none", "ghost", "resample")


@dataclass
class SAEConfig(Group, group="sae"):
    """Keys that every architecture honours; a subclass in the architecture's file adds its own."""

    architecture: str = ""
    """Name of the architecture, which is the name of its file in `saepipe/saes/`."""
    d_sae: int | None = key(None, least=1)
    """Number of latents; None is expansion times the width of the activations."""
    expansion: int = key(8, least=1)
    """Latents per input dimension, where d_sae does not say how many there are."""
    normalize_activations: str = key("expected_average_only_in", choices=NORMALISATIONS)
    """none, or expected_average_only_in: inputs scaled so that their mean norm is sqrt(d_in), and the targets of a
    transcoder so that theirs is sqrt(d_out)."""
    apply_b_dec_to_input: bool = True
    """Subtract the decoder's bias from the input before encoding; always false for a transcoder."""
    skip_connection: bool = False
    """Add a linear function of a transcoder's input to what it predicts."""
    b_dec_init_method: str = key("mean", choices=B_DEC_INIT_METHODS)
    """Where the decoder's bias starts: at the mean or the geometric_median of what is reconstructed, or at zeros."""
    decoder_init_norm: float = key(0.1, above=0)
    """Norm of each decoder row at the start (1 with normalize_sae_decoder); an autoencoder's encoder starts as the
    decoder transposed."""
    normalize_sae_decoder: bool = False
    """Hold every decoder row at norm 1."""
    mse_reduction: str = key("sum", choices=MSE_REDUCTIONS)
    """sum or mean of the squared error over d_out (always a mean over tokens); published coefficients assume sum."""
    dead_after_tokens: int = key(1_000_000, least=1)
    """A latent that has not fired for this many training tokens counts as dead."""
    dead_method: str = key("none", choices=DEAD_METHODS)
    """What is done for dead latents. none; ghost: a gradient that makes them predict what is left over; resample: new
    weights, from the rows that are reconstructed worst."""
    resample_every_steps: int = key(25_000, least=1)
    """Steps between two resamplings."""
    resample_times: int = key(4, least=1)
    """Resamplings in all; what follows is for the new latents to settle."""
    resample_scale: float = key(0.2, above=0)
    """Norm of a resampled latent's encoder weights, as part of the mean norm of the live ones'."""

    def __getattr__(self, name: str) -> Any:
        """Find what an SAE's own copy of its configuration knows from elsewhere: `sae.cfg.hook_name`."""
        metadata = vars(self).get("metadata")
        if metadata is not None and metadata.knows(name):
            return getattr(metadata, name)
        raise AttributeError(f"the configuration of {type(self).architecture} SAEs has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what an SAE's own copy knows from elsewhere where it is kept."""
        metadata = vars(self).get("metadata")
        if metadata is not None and metadata.knows(name) and name not in vars(self):
            metadata[name] = value
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """All of its keys; of an SAE's own copy also its widths and its metadata."""
        own = {name: value for name, value in vars(self).items() if name != "metadata"}
        metadata = dict(vars(self).get("metadata", {}))
        return metadata | own | {"metadata": metadata}

    def __post_init__(self) -> None:
        """Check that the keys are this architecture's, and their ranges."""
        if self.architecture != type(self).architecture:
            raise UserError(
                f"sae.architecture={self.architecture} does not go with the keys of {type(self).architecture}; "
                f"choose the whole group with sae={self.architecture}"
            )
        super().__post_init__()

    def resolve(self, d_in: int) -> int:
        """Width of the SAE on activations of width `d_in`.

        Raises:
            UserError: A key that does not fit the width; the message names it.
        """
        return self.expansion * d_in if self.d_sae is None else self.d_sae

    def resamples(self, steps_done: int) -> bool:
        """Whether dead latents are resampled after this many optimizer steps."""
        times, left = divmod(steps_done, self.resample_every_steps)
        return self.dead_method == "resample" and not left and 0 < times <= self.resample_times
