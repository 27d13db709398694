"""The SAEs that are attached to a language model, by the names that users of SAELens know."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from saepipe import splicing
from saepipe.activation_cache import ActivationCache
from saepipe.activations import BridgeHooks, Hooks
from saepipe.errors import UserError
from saepipe.hook_names import split_head
from saepipe.saes.base import SAE
from saepipe.splicing import Splice

log = logging.getLogger(__name__)

Special = bool | Sequence[int]
"""Whether (or where which ids stand) an SAE leaves special tokens as they are."""


class AttachedSAEs:
    """The part of a model that knows of the SAEs in place.

    Every method that takes `saes` takes one or a list, and with it:

        use_error_term: Whether to add what the SAE does not reconstruct; see `Splice`.
        exclude_special_tokens: True leaves the activations of special tokens as they are, a list those of these ids.
        reset_saes_end: Whether afterwards everything is attached as it was before.
    """

    model_name: str
    compatibility_mode: bool
    _hooks: Hooks
    _centred: bool
    _splices: list[Splice]
    _told: set[str]
    special_ids: list[int]
    __call__: Callable[..., Any]
    run_with_cache: Callable[..., tuple[Any, ActivationCache | dict[str, Tensor]]]
    run_with_hooks: Callable[..., Any]

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The attached SAEs, by the hook that each reads."""
        return {splice.hook_in: splice.sae for splice in self._splices}

    def add_sae(self, sae: Any, use_error_term: bool | None = None, exclude_special_tokens: Special = False) -> None:
        """Attach an SAE until `reset_saes`, in the place of one that reads or replaces the same.

        Args:
            sae: The SAE; its metadata says where it belongs.
            use_error_term: Whether to add what the SAE does not reconstruct; see `Splice`.
            exclude_special_tokens: True leaves the activations of special tokens as they are, a list those of these
                ids.

        Raises:
            UserError: It is no SAE, or this model has no such hook; that it is of the wrong width is said when it runs.
        """
        special = self.special_ids if exclude_special_tokens is True else list(exclude_special_tokens or ())
        splice = Splice(sae, use_error_term=use_error_term, special=special)
        place_in, place_out = (self._place(hook) for hook in (splice.hook_in, splice.hook_out))
        for doubt in splicing.doubts(
            sae, model_name=self.model_name, compatibility_mode=self.compatibility_mode, centred=self._centred
        ):
            if doubt not in self._told:  # an SAE may be attached for each of a thousand prompts
                self._told.add(doubt)
                log.warning(doubt)
        others = [
            other
            for other in self._splices
            if self._place(other.hook_in) != place_in and self._place(other.hook_out) != place_out
        ]
        self._splices = [*others, splice]

    def reset_saes(
        self, act_names: str | Sequence[str] | None = None, prev_saes: Sequence[SAE | None] | None = None
    ) -> None:
        """Detach SAEs.

        Args:
            act_names: The hooks that they read; None detaches all.
            prev_saes: What to attach instead, one for each name, or None for nothing.

        Raises:
            UserError: There are other than as many names as SAEs.
        """
        names = (
            list(self.acts_to_saes) if act_names is None else [act_names] if isinstance(act_names, str) else act_names
        )
        if prev_saes is not None and len(prev_saes) != len(names):
            raise UserError(f"prev_saes holds {len(prev_saes)} SAEs for {len(names)} act_names; give one for each")
        for name in names:
            if name not in self.acts_to_saes:
                log.warning("no SAE is attached to %s; attached are %s", name, list(self.acts_to_saes) or "none")
        self._splices = [splice for splice in self._splices if splice.hook_in not in names]
        for sae in prev_saes or []:
            if sae is not None:
                self.add_sae(sae)

    @contextmanager
    def saes(
        self,
        saes: SAE | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Special = False,
    ) -> Iterator[Any]:
        """Attach SAEs for a while; the arguments are those of the class."""
        before, given = self._splices, [saes] if isinstance(saes, SAE) else list(saes)
        try:
            for sae in given:
                self.add_sae(sae, use_error_term, exclude_special_tokens)
            in_place = [splice.sae for splice in self._splices]
            if left_out := [sae for sae in given if not any(sae is other for other in in_place)]:
                log.warning(
                    "saes holds several that read or replace one hook: the last is in place; without effect: %s",
                    ", ".join(self.get_sae_hook_name(sae, "").rstrip(".") for sae in left_out),
                )
            yield self
        finally:
            if reset_saes_end:
                self._splices = before

    def run_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Special = False,
        **keys: Any,
    ) -> Any:
        """Run the model with SAEs; the other arguments are those of `forward`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*args, **keys)

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Special = False,
        **keys: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """Run the model with SAEs and keep what passes, in the SAEs too; the others are those of `run_with_cache`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(*args, **keys)

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Special = False,
        **keys: Any,
    ) -> Any:
        """Run the model with SAEs and functions at hook points; the other arguments are those of `run_with_hooks`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_hooks(*args, **keys)

    def get_sae_hook_name(self, sae: SAE, internal: str = "hook_sae_acts_post") -> str:
        """Name one of an SAE's own hook points, as caches and hooks do."""
        return f"{sae.metadata.get('hook_name_out') or sae.metadata['hook_name']}.{internal}"

    def _place(self, name: str) -> Hashable:
        """Return what all names of a place have in common.

        Raises:
            UserError: The model has no such hook.
        """
        point, head = split_head(name)
        try:
            return self._hooks.same_point(point), head
        except UserError as error:
            cure = (
                ""
                if self.has_all_hooks
                else ("; a hook that only TransformerLens has needs HookedSAETransformer.from_pretrained_no_processing")
            )
            raise UserError(f"{self.model_name} has no hook {name} for this SAE: {error}{cure}") from None

    @property
    def has_all_hooks(self) -> bool:
        """Whether the model has every hook point of TransformerLens, through whose bridge it runs then."""
        return isinstance(self._hooks, BridgeHooks)
