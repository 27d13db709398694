"""Functions that a user puts at hook points, and SAEs in place, made into what one forward pass calls.

At a hook point come, in this order, the functions in the order in which they were given, what is recorded there, and
the SAE that replaces it. So a function at the hook point itself sees, and may change, what the SAE reads; what goes on
from there is at the SAE's own point `hook_sae_output`.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from saepipe.activations import HookFunction, Hooks, Stop
from saepipe.edits import is_mid, mid_functions, per_token, shown
from saepipe.errors import UserError, unknown
from saepipe.hook_names import split_head
from saepipe.splicing import POINTS, Splice, Step

Where = str | Callable[[str], bool]
"""Name of a hook point, or a function that says of each name whether it is meant."""

FunctionsAt = Sequence[tuple[Where, Callable[..., Any]]]
"""Pairs of where a function goes, and the function."""

_SWITCHED = ("hook_mlp_in",)
"""Hook points of the bridge that it does not pass unless told to."""


class Hook:
    """The hook point that a function is called at, as TransformerLens hands it over."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[Any, Any] = {}
        """What functions want to keep from one call to the next."""

    def layer(self) -> int:
        """Number of the decoder block."""
        return int(self.name.split(".")[1])


class Put(NamedTuple):
    """A user's function, and where it goes."""

    where: Where
    function: Callable[..., Any]
    """`function(activations, hook=hook)` returns what replaces them, or None; of a backward one, gradients."""
    backward: bool = False
    permanent: bool = False
    """Whether it stays where functions are taken off."""


class ForwardPass:
    """What happens at the hook points in one forward pass.

    Args:
        hooks: The model's hook points.
        splices: SAEs in place.
        ids: What the model reads.
    """

    def __init__(self, hooks: Hooks, splices: Sequence[Splice], ids: Int[Tensor, "batch seq"]) -> None:
        self._hooks, self._splices, self._ids, self._shape = hooks, splices, ids, ids.shape
        self._steps: dict[Hashable, list[Step]] = {}
        self._names: dict[Hashable, str] = {}
        self._at_saes: dict[str, list[Step]] = {name: [] for splice in splices for name in splice.points}
        self._unreached: set[str] = set()
        self.residual: Tensor | None = None
        """The residual stream where `stop` ended the forward pass."""

    def put(self, put: Put, hook_of: Callable[[str], Hook]) -> None:
        """Add a user's function, once at each hook point that it is for, by however many names that is known.

        Args:
            put: The function.
            hook_of: Gives what stands for a hook point when the function is called there.

        Raises:
            UserError: There is no such hook point.
        """
        met: set[Hashable] = set()
        for name in self.find(put.where):
            key = self._key(name)
            if key in met:
                continue
            met.add(key)
            step = (_backward if put.backward else _forward)(put.function, hook_of(name))
            if split_head(name)[1] is not None:
                step = _step(shown(name, step, self._shape, self._hooks.device))
            self._add(name, step)

    def record(
        self,
        names: Iterable[str],
        into: dict[str, Tensor],
        keep: Callable[[str, Tensor], Tensor],
        *,
        gradients: bool = False,
    ) -> None:
        """Record what passes hook points, once for all names of one.

        Args:
            names: Their names.
            into: Name -> what `keep` made of the activations.
            keep: Called with a name and the activations.
            gradients: Record the gradients too, once they are known, as `<name>_grad`.
        """
        points: dict[Hashable, list[str]] = {}
        for name in names:
            points.setdefault((self._key(name), split_head(name)[1]), []).append(name)
        for alike in points.values():
            self._add(alike[0], self._recorder(alike, into, keep, gradients))

    def splice(self) -> None:
        """Put the SAEs in place."""
        for splice in self._splices:
            for name, step in splice.steps(self._at, self._ids):
                self._unreached.add(name)
                self._add(name, self._reaching(name, _step(shown(name, step, self._shape, self._hooks.device))))

    def stop(self, layer: int, n_layers: int) -> None:
        """End the forward pass before a decoder block; to be called last.

        Args:
            layer: Number of the block; the number of blocks ends it after the last.
            n_layers: How many there are.
        """
        last = layer == n_layers

        def end(found: Tensor) -> Tensor:
            self.residual = found
            raise Stop

        name = f"blocks.{layer - 1}.hook_resid_post" if last else f"blocks.{layer}.hook_resid_pre"
        self._add(name, end, first=not last)

    def functions(self) -> dict[str, HookFunction]:
        """Return what to call at the hook points of the model."""
        for key in [key for key, name in self._names.items() if is_mid(name)]:
            middle = _step(_chain(self._steps.pop(key)))
            for name, function in mid_functions(self._names[key], middle, self._hooks.device).items():
                self._add(name, _step(function))
        return {self._names[key]: _chain(steps) for key, steps in self._steps.items()}

    def find(self, where: Where) -> list[str]:
        """Find the names that are meant.

        Raises:
            UserError: There is no hook point of that name.
        """
        if callable(where):
            return [name for name in [*self._hooks.listed, *self._at_saes] if where(name)]
        base, _, point = where.rpartition(".")
        if point not in POINTS:
            self._key(where)
            return [where]
        if not self._at_saes:
            raise UserError(
                f"hook={where} belongs to an SAE, and none is attached; attach it with add_sae or saes=[sae]"
            )
        alike = [name for name in self._at_saes if name.endswith(point) and self._alike(name[: -len(point) - 1], base)]
        if where not in self._at_saes and not alike:
            raise unknown("hook", where, self._at_saes)
        return [where] if where in self._at_saes else alike[:1]

    def check_reached(self) -> None:
        """Make sure, after a whole forward pass, that no SAE was passed by.

        Raises:
            UserError: One was.
        """
        for name in sorted(self._unreached):
            leaf = name.rsplit(".", 1)[-1]
            cure = f"switch it on with model.set_use_{leaf}(True)" if leaf in _SWITCHED else "choose another hook"
            raise UserError(f"{name} is not passed by this model's forward pass, so no SAE can be there; {cure}")

    def _reaching(self, name: str, step: Step) -> Step:
        def reaching(found: Tensor) -> Tensor:
            self._unreached.discard(name)
            return step(found)

        return reaching

    def _alike(self, name: str, other: str) -> bool:
        """Say whether two names mean one place."""
        return self._key(name) == self._key(other) and split_head(name)[1] == split_head(other)[1]

    def _key(self, name: str) -> Hashable:
        """Return what is the same for all names of a hook point."""
        if name in self._at_saes:
            return name
        # The stream between attention and MLP shares a point of the bridge with the input of a LayerNorm
        return self._hooks.same_point(split_head(name)[0]), is_mid(name)

    def _add(self, name: str, step: Step, *, first: bool = False) -> None:
        if name in self._at_saes:
            self._at_saes[name].append(step)
            return
        key = self._key(name)
        self._names.setdefault(key, split_head(name)[0])
        steps = self._steps.setdefault(key, [])
        steps.insert(0 if first else len(steps), step)

    def _at(self, name: str, found: Tensor) -> Tensor:
        for step in self._at_saes[name]:
            found = step(found)
        return found

    def _recorder(
        self, names: list[str], into: dict[str, Tensor], keep: Callable[[str, Tensor], Tensor], gradients: bool
    ) -> Step:
        one_head = split_head(names[0])[1] is not None and names[0] not in self._at_saes

        def kept(found: Tensor, ending: str = "") -> None:
            seen = keep(names[0], per_token(names[0], found, self._shape) if one_head else found)
            into.update(dict.fromkeys((name + ending for name in names), seen))

        def step(found: Tensor) -> Tensor:
            kept(found)
            return _differentiated(found, lambda gradient: kept(gradient, "_grad")) if gradients else found

        return step


def _forward(function: Callable[..., Any], hook: Hook) -> Step:
    """Call a user's function with a copy: it may write to it, which the gradient of what made it would not survive."""

    def step(found: Tensor) -> Tensor:
        given = found.clone()
        replaced = function(given, hook=hook)
        if not isinstance(replaced, Tensor | None):
            kind = type(replaced).__name__
            raise UserError(f"the function at {hook.name} returned {kind}; let it return activations, or None")
        if replaced is None:
            return given
        if replaced.shape != found.shape:
            raise UserError(
                f"the function at {hook.name} returned shape {list(replaced.shape)} for {list(found.shape)}; let it "
                "return the shape that it was given"
            )
        return replaced

    return step


def _backward(function: Callable[..., Any], hook: Hook) -> Step:
    """Call a user's function with the gradient, which what it returns replaces (TransformerLens takes tuples too)."""

    def on_gradient(gradient: Tensor) -> Tensor | None:
        replaced = function(gradient, hook=hook)
        return replaced[0] if isinstance(replaced, tuple) else replaced

    def step(found: Tensor) -> Tensor:
        return _differentiated(found, on_gradient)

    return step


def _differentiated(found: Tensor, on_gradient: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Return activations whose gradient a function sees: another view where `found` is one, which would stay unused.

    Heads apart are such a view. Other activations stay as they are: what a hook changes, TransformerLens computes anew.
    """
    if found.requires_grad:
        found = found.view_as(found) if found._is_view() else found
        found.register_hook(on_gradient)
    return found


def _step(function: HookFunction) -> Step:
    """Have a function return what it leaves, too."""

    def step(found: Tensor) -> Tensor:
        replaced = function(found)
        return found if replaced is None else replaced

    return step


def _chain(steps: Sequence[Step]) -> HookFunction:
    def function(found: Tensor) -> Tensor | None:
        value = found
        for step in steps:
            value = step(value)
        # The model goes on with a copy: it may write in place (Falcon does) to what a function has kept
        return None if value is found else value.clone()

    return function
