"""A lower layer never imports a higher one, and each module imports the libraries of its row only.

The imports are read with `ast`, those inside functions too, so nothing hides behind a lazy import.
"""

import ast
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saepipe"
LANGUAGE_MODEL_LIBRARIES = {"transformer_lens", "transformers", "datasets"}

TENSORS = {"torch", "jaxtyping", "numpy"}
HYDRA = {"hydra", "omegaconf"}

# Module below saepipe (a star stands for any name) -> its layer and the third-party packages that it may import.
# The first row that fits counts.
ROOMS: dict[str, tuple[int, set[str]]] = {
    "errors": (0, set()),
    "not_taken": (1, set()),
    "caching": (3, TENSORS),
    "keys": (0, set()),
    "config": (0, set()),
    "cluster": (0, set()),
    "hook_names": (0, set()),
    "permutation": (0, {"numpy"}),
    "metrics": (0, TENSORS),
    "document_sums": (0, TENSORS),
    "redundancy": (0, TENSORS),
    "tally": (1, TENSORS),
    "targets": (2, set()),
    "comparison": (3, set()),
    "matching": (0, {"numpy", "jaxtyping"}),
    "known_features": (0, TENSORS),
    "superposition": (0, TENSORS),
    "density_plot": (0, set()),
    "feature_page": (2, set()),
    "kept_contexts": (0, TENSORS),
    "neighbours": (0, TENSORS),
    "latents": (3, TENSORS | {"tqdm"}),
    "latent_labels": (1, set()),
    "logit_lens": (3, TENSORS),
    "features": (4, TENSORS),
    "durable": (0, {"xxhash"}),
    "sparse": (0, TENSORS),
    "sparse_triton": (0, TENSORS | {"triton"}),
    "ranks": (0, TENSORS),
    "schedule": (1, set()),
    "launched": (1, {"torch"}),
    "grid": (2, {"omegaconf"}),
    "point": (2, TENSORS),
    "watch": (1, TENSORS),
    "heldout": (2, TENSORS),
    "rank_processes": (3, {"torch"}),
    "callbacks": (3, {"torch", "lightning"}),
    "job": (3, TENSORS | {"lightning"}),
    "progress": (0, {"tqdm"}),
    "parallel": (0, set()),
    "lock": (1, set()),
    "hub_files": (2, {"huggingface_hub"}),
    "hub": (1, {"huggingface_hub"}),
    "conversations": (1, set()),
    "data_files": (1, {"datasets"}),
    "sources": (1, {"numpy", "xxhash", "datasets"}),
    "token_store": (1, {"numpy", "jaxtyping"}),
    "token_writer": (1, {"numpy", "jaxtyping", "xxhash"}),
    "packing": (1, {"numpy", "jaxtyping", "transformers"}),
    "chat_template": (1, {"numpy", "jaxtyping", "transformers"}),
    "encoding": (1, {"numpy", "jaxtyping", "transformers"}),
    "tokens": (1, {"numpy", "tqdm", "transformers"}),
    "token_text": (1, {"transformers"}),
    "processes": (0, set()),
    "layout": (1, {"numpy", "jaxtyping"}),
    "plan": (1, set()),
    "record": (1, {"numpy", "jaxtyping"}),
    "int8": (1, TENSORS),
    "shard": (1, TENSORS | {"xxhash"}),
    "shard_writer": (1, TENSORS | {"xxhash"}),
    "manifest": (1, TENSORS),
    "order": (1, {"numpy", "jaxtyping"}),
    "shuffle": (1, {"numpy"}),
    "store": (1, TENSORS | {"tqdm"}),
    "inspection": (1, {"numpy", "tqdm"}),
    "row_filter": (1, {"numpy", "jaxtyping"}),
    "claims": (1, set()),
    "workers": (1, {"tqdm"}),
    "groups": (1, TENSORS),
    "saes": (1, {"torch", "jaxtyping"}),
    "saes.*": (1, {"torch", "jaxtyping"}),
    "activations": (2, TENSORS | {"transformers", "transformer_lens"}),
    "places": (1, {"transformers"}),
    "placement": (1, {"torch"}),
    "neuronpedia": (4, set()),
    "pretrained": (3, {"torch", "yaml"}),
    "model_files": (1, {"torch", "transformers"}),
    "edits": (2, TENSORS),
    "activation_cache": (2, TENSORS | {"transformer_lens"}),
    "attached": (3, TENSORS),
    "generation": (3, TENSORS),
    "hooked": (3, TENSORS | {"transformers"}),
    "hooking": (3, TENSORS),
    "model_names": (1, {"transformer_lens"}),
    "model_view": (2, TENSORS | {"transformers"}),
    "opening": (2, {"torch", "transformers"}),
    "outputs": (1, TENSORS),
    "prompts": (1, TENSORS | {"transformers"}),
    "sampling": (1, TENSORS),
    "splicing": (2, TENSORS),
    "language_model": (2, TENSORS | {"transformers", "transformer_lens"}),
    "background": (0, set()),
    "batch_rows": (2, TENSORS),
    "windows": (2, TENSORS),
    "stream": (2, TENSORS),
    "centre": (2, TENSORS),
    "formats": (2, TENSORS),
    "formats.*": (2, TENSORS | {"safetensors"}),
    "measure": (3, TENSORS | {"tqdm"}),
    "entry": (3, HYDRA | {"yaml"}),
    "overrides": (0, HYDRA),
    "composition_errors": (2, {"omegaconf", "yaml"}),
    "module": (3, TENSORS | {"lightning", "tqdm"}),
    "checkpoints": (2, {"torch"}),
    "provenance": (3, {"torch"}),
    "runs": (3, set()),
    "loggers": (3, TENSORS | {"lightning", "wandb", "tensorboard"}),
    "projection": (3, TENSORS),
    "capturing": (3, TENSORS | {"tqdm"}),
    "overview": (1, set()),
    "repair": (3, {"torch"}),
    "cache": (4, TENSORS | {"tqdm"}),
    "shards": (4, set()),
    "model_card": (3, set()),
    "export": (4, {"huggingface_hub", "yaml"}),
    "fitting": (3, {"torch", "lightning"}),
    "run_length": (1, set()),
    "stopping": (0, set()),
    "untrained": (2, {"torch"}),
    "train": (4, {"torch"}),
    "evaluate": (4, set()),
    "analyze": (4, TENSORS | {"tqdm"}),
    "in_memory": (1, set()),
    "mixing": (0, TENSORS),
    "activations_store": (3, TENSORS),
    "saelens_names": (2, set()),
    "saelens": (5, set()),
    "latent_keys": (0, set()),
    "bench_keys": (0, set()),
    "reading": (3, TENSORS),
    "typical": (3, TENSORS),
    "steering": (3, TENSORS),
    "attribution": (3, TENSORS),
    "ablation": (3, TENSORS),
    "separation": (3, TENSORS),
    "trained": (3, set()),
    "steer": (4, set()),
    "attribute": (4, set()),
    "contrast": (4, set()),
    "bench_figure": (3, set()),
    "bench_store": (3, TENSORS),
    "bench_cache": (4, TENSORS | {"transformers"}),
    "bench_stream": (4, TENSORS),
    "bench_memory": (4, TENSORS),
    "bench_grid": (5, set()),
    "bench_limits": (4, TENSORS),
    "bench_step": (4, TENSORS | {"safetensors"}),
    "bench_train": (5, {"torch", "lightning", "safetensors"}),
    "bench_start": (5, set()),
    "bench_ranks": (4, TENSORS),
    "bench_evaluate": (4, TENSORS),
    "bench_experiment": (5, {"safetensors"}),
    "contest": (1, set()),
    "contestant": (4, TENSORS | {"safetensors"}),
    "own_steps": (3, TENSORS),
    "peer_steps": (3, {"torch", "sae_lens", "dictionary_learning", "sparsify"}),
    "bench": (5, {"torch", "transformers"}),
    "demo.__main__": (5, set()),
    "demo.pipeline": (5, set()),
    "demo.acceptance": (5, {"torch"}),
    "demo.labelled_tokens": (5, TENSORS),
    "demo.truth": (5, TENSORS),
    "demo.bigram": (5, TENSORS),
    "demo.train_model": (5, TENSORS | {"transformers", "tokenizers", "tqdm"}),
    "demo": (0, set()),
    "demo.*": (0, set()),
    "": (0, set()),  # saepipe/__init__.py, the front door: see UPWARD
}

# Imports of a higher layer that are wanted, (from, to) -> why; only inside functions or for type checkers.
UPWARD = {
    ("", "*"): "the front door re-exports what any layer holds, each when first used",
    ("saes.stored", "*"): "SAE.load and SAE.from_pretrained are methods, as SAELens' users know them",
}


class Import(NamedTuple):
    """One import: what, on which line, and whether it runs when the module is loaded."""

    target: str
    line: int
    at_load: bool


def row_of(module: str) -> tuple[int, set[str]] | None:
    """Find the row of a module such as `saes.topk`."""
    parents = [f"{module.rsplit('.', depth)[0]}.*" for depth in range(1, module.count(".") + 1)]
    return next((ROOMS[row] for row in [module, *parents] if row in ROOMS), None)


@cache
def modules() -> dict[str, Path]:
    """Name every module below saepipe -> its file."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in paths.items()}


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """List what a module imports, with the file's own names of submodules resolved."""
    return tuple(_imports(ast.parse(modules()[module].read_text(encoding="utf-8")), at_load=True))


def _imports(node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(name, child.lineno, at_load) for name in _from_targets(child))
        elif isinstance(child, ast.Call):
            yield from (Import(name, child.lineno, at_load) for name in _dynamic_targets(child))
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_for_types(child)
        yield from _imports(child, at_load=at_load and not later)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _from_targets(node: ast.ImportFrom) -> list[str]:
    """`from saepipe import saes` imports that module, `from saepipe.saes import SAE` a name in `saepipe.saes`."""
    base = "." * node.level + (node.module or "")
    named = [f"{base}.{alias.name}" for alias in node.names]
    return [name if ours(name) in modules() or base == "saepipe" else base for name in named]


def _dynamic_targets(node: ast.Call) -> list[str]:
    """Follow `import_module("a.b")`, and `import_module(f"saepipe.saes.{name}")` to every module that it can name."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called not in ("import_module", "__import__") or not node.args:
        return []
    match node.args[0]:
        case ast.Constant(value=str(name)):
            return [name]
        case ast.JoinedStr(values=[ast.Constant(value=str(prefix)), *_]):
            return [f"saepipe.{name}" for name in modules() if f"saepipe.{name}".startswith(prefix)]
    return []


def ours(target: str) -> str | None:
    """Strip `saepipe.`; None for other people's packages."""
    return target.removeprefix("saepipe").removeprefix(".") if target.split(".")[0] == "saepipe" else None


def reached_from(module: str) -> dict[str, str]:
    """Map every module of ours that one can end up importing -> the one that imports it.

    A package's `__init__` runs when a module in it is imported, but the functions in it do not.
    """
    found, waiting = {module: module}, [(module, True)]
    while waiting:
        here, whole = waiting.pop()
        for item in imports_of(here):
            target = ours(item.target)
            if target is None or not (whole or item.at_load):
                continue
            packages = [target.rsplit(".", depth)[0] for depth in range(1, target.count(".") + 1)]
            for name, entered in [(target, target != ""), ("", False), *((package, False) for package in packages)]:
                if name in modules() and name not in found:
                    found[name] = here
                    waiting.append((name, entered))
    return found


def label(module: str) -> str:
    return modules()[module].relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_row(module: str) -> None:
    assert row_of(module), f"{label(module)} has no row in ROOMS of tests/test_layers.py: add one with its layer"


def test_every_row_has_a_module() -> None:
    patterns = {row.removesuffix(".*") for row in ROOMS if row.endswith(".*")}
    gone = {row for row in ROOMS if not row.endswith(".*")} - set(modules())
    assert not gone, f"ROOMS names modules that are not there: {sorted(gone)}"
    assert patterns <= set(modules())


@pytest.mark.parametrize("module", modules())
def test_no_import_of_a_higher_layer(module: str) -> None:
    layer, _ = row_of(module) or (0, set())
    for item in imports_of(module):
        here, target = f"{label(module)}:{item.line}", ours(item.target)
        assert not item.target.startswith("."), f"{here} imports relatively; write saepipe.<module>"
        if target is None or target.startswith("__"):
            continue
        assert target in modules(), (
            f"{here} imports {item.target}, which is no module: import it from where it is defined"
        )
        row = row_of(target) or (0, set())
        wanted = not item.at_load and {(module, target), (module, "*")} & set(UPWARD)
        assert row[0] <= layer or wanted, (
            f"{here} (layer {layer}) imports {item.target} (layer {row[0]}): "
            "move what it needs down, or hand it in as an argument"
        )


@pytest.mark.parametrize("module", modules())
def test_third_party_imports_are_in_the_row(module: str) -> None:
    _, allowed = row_of(module) or (0, set())
    for item in imports_of(module):
        package = item.target.split(".")[0]
        if package not in sys.stdlib_module_names | {"saepipe", ""}:
            assert package in allowed, (
                f"{label(module)}:{item.line} imports {package}; its row allows {sorted(allowed)}"
            )


def test_train_reaches_no_language_model_library() -> None:
    reached = reached_from("train")
    assert {"config", "entry", "stream", "module", "formats.saelens"} <= set(
        reached
    )  # else the search itself is broken
    for module, by in reached.items():
        for item in imports_of(module):
            assert item.target.split(".")[0] not in LANGUAGE_MODEL_LIBRARIES, (
                f"train reaches {item.target} through {label(module)}:{item.line} (imported by {label(by)})"
            )


def loaded_by(code: str) -> set[str]:
    """Run code in a fresh interpreter and name the top-level modules that are loaded at its end."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n"))


def test_import_saepipe_is_light() -> None:
    loaded = loaded_by("import saepipe")
    assert "saepipe" in loaded
    assert not loaded & ({"torch", "lightning", "numpy", "hydra", "wandb"} | LANGUAGE_MODEL_LIBRARIES)


@pytest.mark.parametrize("verb", ["cache", "train", "evaluate", "analyze", "bench"])
def test_help_loads_no_heavy_library(verb: str) -> None:
    call = f"import runpy; sys.argv = ['{verb}', '--help']; runpy.run_module('saepipe.{verb}', run_name='__main__')"
    loaded = loaded_by(call)
    assert {"saepipe.entry", "saepipe.config", "hydra"} <= loaded
    assert not loaded & ({"torch", "lightning", "wandb"} | LANGUAGE_MODEL_LIBRARIES)


def test_the_verbs_that_ask_about_latents_load_no_heavy_library() -> None:
    loaded = loaded_by("import saepipe.attribute, saepipe.contrast, saepipe.steer")
    assert {"saepipe.attribute", "saepipe.contrast", "saepipe.steer"} <= loaded
    assert not loaded & ({"torch", "lightning", "wandb"} | LANGUAGE_MODEL_LIBRARIES)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("shards", ["--help"]), ("shards", ["verify", "--help"]), ("shards", ["repair"]), ("export", ["--help"])],
)
def test_help_of_a_file_tool_loads_no_heavy_library(tool: str, arguments: list[str]) -> None:
    call = f"import runpy; sys.argv = {[tool, *arguments]}; runpy.run_module('saepipe.{tool}', run_name='__main__')"
    assert not loaded_by(call) & ({"torch", "lightning", "wandb", "numpy"} | LANGUAGE_MODEL_LIBRARIES)


@pytest.mark.parametrize("module", ["train", "shards"])
def test_help_answers_at_once(module: str) -> None:
    times_s = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", f"saepipe.{module}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        times_s.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert ("verify" if module == "shards" else "sae") in done.stdout
    assert statistics.median(times_s) < 3
