"""Build the API reference from the docstrings: `make docs`, or `python docs/api.py FOLDER`."""

import pkgutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pdoc

import saepipe
from saepipe import saes

OUT = Path(__file__).parents[1] / "build" / "docs"


def build(out: Path) -> list[str]:
    """Write a page for each module, an index and a search.

    Args:
        out: Folder to write to.

    Returns:
        The modules and packages that were asked for.
    """
    for name in saepipe.__all__:  # the front door imports what is behind a name when it is first used
        vars(saepipe)[name] = getattr(saepipe, name)
    names = ["saepipe", "launch"]
    for package in (saepipe, saes):  # pdoc walks packages itself, but for those whose `__all__` names no modules
        names += [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    if find_spec("triton") is None:  # its kernels cannot be imported without
        names.remove("saepipe.sparse_triton")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*names, output_directory=out)
    return names


def main() -> None:
    """Build it where the command line says, or in build/docs."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    names = build(out)
    sys.stdout.write(f"{out / 'index.html'}: {len(names)} modules and packages\n")


if __name__ == "__main__":
    main()
