"""What is imported stays light until it is used, and is all there."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from subprocess import run

import pytest

import conformance

HEAVY = ("torch", "transformers", "transformer_lens", "hypothesis")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("conformance", (*HEAVY, "pytest", "click", "rich", "adapter")),
        ("conformance.plugin", (*HEAVY, "click", "rich", "adapter")),
        ("conformance.cli", (*HEAVY, "pytest", "adapter")),
        ("conformance.spec", (*HEAVY, "pytest")),
        ("conformance.locate", (*HEAVY, "pytest")),
    ],
)
def test_importing_is_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What the kit takes from transformer_lens, all of which is there since 3.0.0. Anything newer is for
# the check that needs it to import, inside `at_work`.
SINCE_3_0 = {
    ("transformer_lens", "ActivationCache"),
    ("transformer_lens", "FactoredMatrix"),
    ("transformer_lens", "patching"),
    ("transformer_lens.config", "TransformerBridgeConfig"),
    ("transformer_lens.factories.architecture_adapter_factory", "ArchitectureAdapterFactory"),
    ("transformer_lens.hook_points", "HookPoint"),
    ("transformer_lens.model_bridge", "TransformerBridge"),
    ("transformer_lens.model_bridge.architecture_adapter", "ArchitectureAdapter"),
    ("transformer_lens.model_bridge.generalized_components", "AttentionBridge"),
    ("transformer_lens.model_bridge.generalized_components", "BlockBridge"),
    ("transformer_lens.model_bridge.generalized_components", "EmbeddingBridge"),
    ("transformer_lens.model_bridge.generalized_components", "LinearBridge"),
    ("transformer_lens.model_bridge.generalized_components", "MLPBridge"),
    ("transformer_lens.model_bridge.generalized_components", "NormalizationBridge"),
    ("transformer_lens.model_bridge.generalized_components", "RotaryEmbeddingBridge"),
    ("transformer_lens.model_bridge.generalized_components", "UnembeddingBridge"),
    ("transformer_lens.model_bridge.generalized_components.base", "GeneralizedComponent"),
    ("transformer_lens.utilities.slice", "Slice"),
}


def test_the_kit_imports_in_every_release_since_3_0() -> None:
    package = Path(conformance.__file__).parent
    ours = [path for path in package.rglob("*.py") if path.parent.name not in ("meta", "mutants")]
    taken = {
        (str(node.module), name.name)
        for path in ours
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("transformer_lens")
        for name in node.names
    }
    assert taken <= SINCE_3_0
    assert not [
        path
        for path in ours
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "adapter"
    ], "an adapter that is not judged is not imported: older releases lack what ours needs"


def test_every_export_is_what_its_home_defines() -> None:
    import adapter
    from conformance import run, spec, verdict

    assert conformance.adapter is adapter
    assert conformance.OlmoArchitectureAdapter is adapter.OlmoArchitectureAdapter
    assert conformance.check_adapter is run.check_adapter
    assert conformance.ConformanceError is verdict.ConformanceError
    for name in ("Case", "ModelSpec", "RunSpec"):
        assert getattr(conformance, name) is getattr(spec, name)
    assert set(conformance.__all__) <= set(dir(conformance))


def test_the_fixed_names_come_by_a_from_import() -> None:
    from conformance import OlmoArchitectureAdapter, __version__, adapter, check_adapter

    assert OlmoArchitectureAdapter is adapter.OlmoArchitectureAdapter
    assert callable(check_adapter)
    assert isinstance(__version__, str)


def test_the_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "version", lambda name: f"{name} 9.8.7")
    assert conformance.__version__ == "olmo-conformance 9.8.7"


def test_a_checkout_that_is_not_installed_has_a_version_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(conformance, "version", missing)
    assert conformance.__version__ == "0+unknown"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'conformance' has no attribute 'nothing'"):
        conformance.nothing  # noqa: B018
